"""ONNX Runtime's GroupQueryAttention: what its fusions for static and for growing caches share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from doge_deploy.graph import stages
from doge_deploy.targets.ort.matching import (
    CONTRIB,
    Emitter,
    Linear,
    attribute,
    constant_ints,
    expect,
    match_linear,
    only_use,
    producer,
)

FUSED_ATTENTION_SINCE = "1.32"
"""The first ONNX Runtime whose GroupQueryAttention has the inputs used here."""

HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class Head:
    """A projection that was split into heads, normalised and rotated."""

    linear: Linear
    heads: int
    normed: ir.Value
    weight: ir.Value
    epsilon: float
    cos: ir.Value
    sin: ir.Value
    """The tables, `[L, D/2]`."""
    positions: ir.Value
    """Rows of the tables, `[B, Q]`."""


@dataclass(frozen=True)
class FusedLayer:
    """What is known of every layer that becomes one operator."""

    node: ir.Node
    query: Head
    key: Head
    value: Linear
    new_key: ir.Value
    """Keys of the new tokens, rotated."""
    output: ir.Value
    """`[B, Q, H*D]`, heads merged."""
    window: int
    """keep_window_size; 0 where all keys are kept."""


@dataclass(frozen=True)
class FusedLengths:
    """Computed once for all layers."""

    tokens: ir.Value
    """Q for each row, `[B]` int32."""
    last_slot: ir.Value
    """Last slot in use of each row, `[B]` int32."""
    total: ir.Value
    """Slots in use of the longest row, an int32 scalar."""


def expect_one_window(windows: Sequence[int]) -> None:
    """There are layers, given by what they keep, and all keep as many keys.

    Raises:
        Declined: it is not so.
    """
    expect(bool(windows), "the graph has no DynamicMaskAttention")
    expect(len(set(windows)) == 1, f"layers keep different numbers of keys: {sorted(set(windows))}")


def expect_known(node: ir.Node, inputs: int) -> None:
    """A DynamicMaskAttention has so many inputs, and no attribute but those that are replaced here.

    Raises:
        Declined: it has others.
    """
    expect(len(node.inputs) == inputs, f"DynamicMaskAttention has {len(node.inputs)} inputs; {inputs} are known here")
    unknown = set(node.attributes) - {"keep_window_size", "scale"}
    expect(not unknown, f"DynamicMaskAttention has attributes that are not known here: {', '.join(sorted(unknown))}")


def match_value(value: ir.Value | None) -> Linear:
    """The projection that gave values of new tokens, `[B, Hkv, Q, D]`.

    Raises:
        Declined: they come from elsewhere.
    """
    transpose = producer(value, "Transpose", "the new value")
    expect(attribute(transpose, "perm") == HEADS_FIRST, "the new value is transposed otherwise")
    return match_linear(producer(transpose.inputs[0], "Reshape", "the new value").inputs[0], "the value")


def match_output(node: ir.Node) -> ir.Value:
    """What a DynamicMaskAttention gives, heads merged, `[B, Q, H*D]`.

    Raises:
        Declined: heads are not merged, or it is used otherwise.
    """
    merge = only_use(node.outputs[0], "Transpose", "the attention output")
    expect(attribute(merge, "perm") == HEADS_FIRST, "heads are merged otherwise")
    return only_use(merge.outputs[0], "Reshape", "the transposed attention output").outputs[0]


def expect_alike(query: Head, key: Head, value: Linear) -> None:
    """Raises Declined where one operator cannot treat the three projections of a layer."""
    expect(query.cos is key.cos and query.sin is key.sin, "query and key are rotated differently")
    expect(query.epsilon == key.epsilon, "the norms of query and key have different epsilons")
    expect(query.linear.x is key.linear.x is value.x, "query, key and value are projected from different states")
    expect(value.output.dtype in (None, ir.DataType.FLOAT), "the model is not float32")


def match_head(value: ir.Value | None, what: str) -> Head:
    """What makes the rotated heads `value`.

    Raises:
        Declined: not as the trace writes it; `what` names the value in the message.
    """
    rotary = producer(value, "RotaryEmbedding", what)
    expect(len(rotary.inputs) == 3, f"{what} is rotated with positions of its own")
    whole = attribute(rotary, "rotary_embedding_dim", 0) == 0 and attribute(rotary, "interleaved", 0) == 0
    expect(whole, f"{what} is rotated in part, or interleaved")
    transpose = producer(rotary.inputs[0], "Transpose", what)
    expect(attribute(transpose, "perm") == HEADS_FIRST, f"{what} is transposed otherwise")
    norm = producer(transpose.inputs[0], "RMSNormalization", what)
    expect(attribute(norm, "stash_type", 1) == 1 and attribute(norm, "axis", -1) == -1, f"{what} is normed otherwise")
    reshape = producer(norm.inputs[0], "Reshape", what)
    shape = constant_ints(reshape.inputs[1])
    expect(shape is not None and len(shape) == 4 and shape[:2] == (0, 0), f"{what} has no fixed number of heads")
    assert shape is not None
    weight = norm.inputs[1]
    expect(weight is not None and weight.is_initializer(), f"the norm of {what} has a computed weight")
    assert weight is not None
    tables = [_table(table, what) for table in rotary.inputs[1:]]
    expect(tables[0][1] is tables[1][1], f"{what} has cos and sin of different positions")
    linear = match_linear(reshape.inputs[0], what)
    size = linear.width // shape[2]
    expect(size % 16 == 0, f"head_dim={size}: GroupQueryAttention takes multiples of 16")
    epsilon = attribute(norm, "epsilon", 1e-5)
    return Head(linear, shape[2], norm.outputs[0], weight, epsilon, tables[0][0], tables[1][0], tables[0][1])


def _table(value: ir.Value | None, what: str) -> tuple[ir.Value, ir.Value]:
    """The table and the positions that are looked up in it."""
    gather = producer(value, "Gather", f"the rotation of {what}")
    table, positions = gather.inputs
    expect(table is not None and table.is_initializer(), f"the rotation of {what} is not a table")
    expect(attribute(gather, "axis", 0) == 0, f"the rotation of {what} is not looked up by position")
    assert table is not None and positions is not None
    return table, positions


def first_user(graph: ir.Graph | ir.Function | None, *linears: Linear) -> ir.Node:
    """The node in front of which everything can stand that depends on the graph's inputs and the layer's state."""
    assert graph is not None
    wanted = {linear.output for linear in linears}
    return next(node for node in graph if any(output in wanted for output in node.outputs))


def emit_norms(emit: Emitter, query: Head, key: Head) -> ir.Value:
    """Query and key heads of all rows normalised by one operator: `[B, Q, (H+Hkv)*D]`, not rotated yet.

    The weights follow as a product. RMSNormalization takes one row per head too, but is seven times slower with it
    (ONNX Runtime 1.32: 304 us instead of 44 us for 512 x 3 heads of 128). BranchwiseRMSNorm would be all of it in one
    operator; a decode step gains 0 to 5 % by it, and a prefill of 128 tokens takes 1.2 times as long.
    """
    heads = emit("Concat", query.linear.output, key.linear.output, axis=-1, name="query_key").outputs[0]
    split = emit.ints(0, 0, query.heads + key.heads, -1, name="heads_shape")
    states = emit("Reshape", heads, split, name="heads").outputs[0]
    size = query.linear.width // query.heads
    ones = emit("Constant", name="ones", value_floats=[1.0] * size).outputs[0]
    normed = emit("RMSNormalization", states, ones, epsilon=query.epsilon, axis=-1, name="normed").outputs[0]
    merged = emit("Reshape", normed, emit.ints(0, 0, -1, name="merged_shape"), name="merged").outputs[0]
    # ONNX Runtime folds the weight.
    rows = [
        emit("Tile", head.weight, emit.ints(head.heads, name=f"{what}_heads"), name=f"{what}_norm").outputs[0]
        for what, head in (("query", query), ("key", key))
    ]
    weight = emit("Concat", *rows, axis=0, name="norm_weight").outputs[0]
    weighted = emit("Mul", merged, weight, name="weighted").outputs[0]
    stages.mark(weighted, [point for head in (query, key) for point in stages.points_of(head.normed)])
    return weighted


def emit_packed(emit: Emitter, layer: FusedLayer) -> ir.Value:
    """Queries, keys and values of the new tokens as the operator takes them: `[B, Q, (H+2*Hkv)*D]`, not rotated yet."""
    normed = emit_norms(emit, layer.query, layer.key)
    return emit("Concat", normed, layer.value.output, axis=-1, name="qkv").outputs[0]


def emit_attention(
    emit: Emitter,
    layer: FusedLayer,
    packed: ir.Value,
    past: tuple[ir.Value, ir.Value],
    positions: ir.Value | None,
    bias: ir.Value,
    lengths: FusedLengths,
) -> tuple[ir.Value, ir.Value]:
    """The operator in the place of a layer's attention.

    Args:
        packed: see `emit_packed`.
        past: keys and values, `[B, Hkv, P or L, D]`.
        positions: of the new tokens, `[B, Q]`; where None they are the slots.
        bias: `[B, 1 or H, Q, K]`.

    Returns:
        Present keys and values, which nothing takes the place of yet.
    """
    query, key = layer.query, layer.key
    fused = emit(
        "GroupQueryAttention",
        packed,
        None,
        None,
        *past,
        lengths.last_slot,
        lengths.total,
        query.cos,
        query.sin,
        positions,
        bias,
        *[None] * 5,  # head_sink, scales of a quantized cache, norms of query and key
        lengths.tokens,
        domain=CONTRIB,
        outputs=3,
        num_heads=query.heads,
        kv_num_heads=key.heads,
        do_rotary=1,
        scale=attribute(layer.node, "scale"),
    )
    inside = [*stages.points_of(layer.node.inputs[0]), *stages.points_of(layer.new_key)]
    fused.metadata_props[stages.COMPUTES] = " ".join(inside)
    stages.move(layer.new_key, fused.outputs[1])
    stages.move(layer.output, fused.outputs[0])
    layer.output.replace_all_uses_with(fused.outputs[0])
    return fused.outputs[1], fused.outputs[2]
