"""Dynamic mask attention as ONNX Runtime's GroupQueryAttention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from doge_deploy.bundle.signature import BATCH, SLOT_INDICES, SLOTS
from doge_deploy.graph import stages
from doge_deploy.graph.schemas import DOMAIN, DYNAMIC_MASK_ATTENTION, WINDOW_BIAS
from doge_deploy.targets.ort.matching import (
    CONTRIB,
    Declined,
    Emitter,
    Linear,
    attribute,
    constant_ints,
    expect,
    match_linear,
    only_use,
    producer,
    require_contrib,
    take_place,
)
from doge_deploy.targets.ort.window import window_bias_function

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
class _Layer:
    node: ir.Node
    query: Head
    key: Head
    value: Linear
    write_indices: ir.Value
    past: tuple[ir.Value, ir.Value, ir.Value]
    """Key, value and score buffers."""
    new_key: ir.Value
    """Keys of the new tokens, rotated."""
    score: ir.Value
    """Scores of the new tokens `[B, Hkv, Q, 1]`."""
    present: tuple[ir.Value, ir.Value, ir.Value]
    output: ir.Value
    """`[B, Q, H*D]`, heads merged."""
    positions: ir.Value
    """Of the new tokens, `[B, Q]`."""
    window: int
    """keep_window_size; 0 where all keys are kept."""


@dataclass(frozen=True)
class _Lengths:
    """Computed once for all layers."""

    first_slot: ir.Value
    """Slot of the first new token of each row, `[B]`."""
    new: ir.Value
    """Q, `[1]` int64."""
    tokens: ir.Value
    """Q for each row, `[B]` int32."""
    last_slot: ir.Value
    """Last slot in use of each row, `[B]` int32."""
    total: ir.Value
    """Slots in use of the longest row, an int32 scalar."""
    total_1d: ir.Value
    """The same, `[1]` int64."""
    score_rows: ir.Value
    """`[1, 1, Q, 1]` as a shape: what a row of scores is expanded to."""


class FuseAttentionPass(ir.passes.InPlacePass):
    """Everything between the three projections and the output projection becomes one GroupQueryAttention.

    That operator rotates queries and keys, writes keys and values into the buffers it is given, and attends over the
    slots in use only, where the standard body attends over all `max_length` of them. The scores of the slots in use go
    in as `attention_bias`; what a row may not see is hidden by the operator itself, which is causal.

    Needs: the static layout; heads of a multiple of 16; every DynamicMaskAttention as the trace writes it, in float32;
    ONNX Runtime 1.32, the first whose operator takes `query_seqlens` (without it a batch cannot continue with more than
    one token a row).
    Promises: graph inputs and outputs as before (where keys are left out those of `signature.windowed`); the same sum
    of products and the same softmax, in another order; the same keys kept, ties to the lowest slot.

    1. Fires on all layers or on none.
    2. Must not fire where a query is rotated by anything but its cache slot, or where the node has an input or
       attribute that this pass does not know.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == DYNAMIC_MASK_ATTENTION]
        layers = [_match(node) for node in nodes]
        expect_one_window([layer.window for layer in layers])
        slots = layers[0].write_indices
        if layers[0].window:
            slots = _add_slots(model, layers)
        lengths = _emit_lengths(layers[0], slots)
        for index, layer in enumerate(layers):
            _emit(layer, index, lengths)
        require_contrib(model)
        return ir.passes.PassResult(model, True)


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


def _match(node: ir.Node) -> _Layer:
    expect_known(node, 5)
    query, key, value, score, first_slot = node.inputs
    query_head = match_head(query, "the query")
    scatters = [_scatter(v, what) for v, what in ((key, "the key"), (value, "the value"), (score, "the score"))]
    key_head = match_head(scatters[0].inputs[1], "the new key")
    value_linear = match_value(scatters[1].inputs[1])
    write_indices = _first_position(query_head.positions, "the query")
    starts = {write_indices, _first_position(key_head.positions, "the new key"), first_slot}
    starts |= {scatter.inputs[2] for scatter in scatters}
    expect(len(starts) == 1, "slots, rotation and visibility do not start at the same place")
    expect_alike(query_head, key_head, value_linear)
    past = tuple(scatter.inputs[0] for scatter in scatters)
    expect(all(p is not None and p.dtype == ir.DataType.FLOAT for p in past), "the caches are not float32")
    per_key_head = past[2] is not None and past[2].shape is not None and past[2].shape[1] == key_head.heads
    expect(per_key_head, "there is not one score per key head")
    output = match_output(node)
    new_key, new_score = (scatter.inputs[1] for scatter in (scatters[0], scatters[2]))
    assert new_key is not None and new_score is not None
    return _Layer(
        node,
        query_head,
        key_head,
        value_linear,
        write_indices,
        past,  # type: ignore[arg-type]
        new_key,
        new_score,
        tuple(scatter.outputs[0] for scatter in scatters),  # type: ignore[arg-type]
        output,
        query_head.positions,
        attribute(node, "keep_window_size"),
    )


def expect_alike(query: Head, key: Head, value: Linear) -> None:
    """Raises Declined where one operator cannot treat the three projections of a layer."""
    expect(query.cos is key.cos and query.sin is key.sin, "query and key are rotated differently")
    expect(query.epsilon == key.epsilon, "the norms of query and key have different epsilons")
    expect(query.linear.x is key.linear.x is value.x, "query, key and value are projected from different states")
    expect(value.output.dtype in (None, ir.DataType.FLOAT), "the model is not float32")


def _scatter(value: ir.Value | None, what: str) -> ir.Node:
    node = producer(value, "TensorScatter", what)
    linear = attribute(node, "mode", "linear") == "linear" and attribute(node, "axis", -2) == -2
    expect(linear, f"{what} is not written slot after slot")
    expect(node.inputs[0] is not None and node.inputs[0].is_graph_input(), f"{what} is not written into a buffer")
    return node


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


def _first_position(positions: ir.Value, what: str) -> ir.Value:
    """The input of which `positions` `[B, Q]` are the consecutive numbers."""
    add = producer(positions, "Add", f"the position of {what}")
    start = producer(add.inputs[0], "Unsqueeze", f"the position of {what}").inputs[0]
    steps = producer(add.inputs[1], "Range", f"the position of {what}")
    first, _, step = steps.inputs
    expect(constant_ints(first) == (0,) and constant_ints(step) == (1,), f"positions of {what} are not consecutive")
    if start is None or not start.is_graph_input():
        raise Declined(f"the position of {what} does not start at a graph input")
    return start


def _add_slots(model: ir.Model, layers: list[_Layer]) -> ir.Value:
    """The form for a window: buffers of any number of slots, and a graph input that says which slot comes next.

    A key that left the window of a row never comes back, so a runner may drop it and move the others together; then the
    next slot is no longer the next position, which `write_indices` still says.
    """
    graph = model.graph
    slots = ir.Value(name=SLOT_INDICES, shape=ir.Shape([BATCH]), type=ir.TensorType(ir.DataType.INT64))
    place = 1 + [value.name for value in graph.inputs].index(layers[0].write_indices.name)
    graph.inputs.insert(place, slots)
    for layer in layers:
        for value in (*layer.past, *layer.present):
            assert value.shape is not None
            value.shape = ir.Shape([SLOTS if axis == 2 else size for axis, size in enumerate(value.shape)])
    function = window_bias_function(layers[0].query.heads, layers[0].key.heads)
    model.functions[function.identifier()] = function
    return slots


def _emit_lengths(layer: _Layer, slots: ir.Value) -> _Lengths:
    first = first_user(layer.node.graph, layer.query.linear, layer.key.linear, layer.value)
    emit = Emitter(first, "lengths")
    zero, one = emit.ints(0, name="zero"), emit.ints(1, name="one")
    tokens = emit("Shape", layer.query.linear.x, start=1, end=2, name="tokens").outputs[0]
    last_token = emit("Sub", tokens, one, name="last_token").outputs[0]
    last_slot = emit("Add", slots, last_token, name="last_slot").outputs[0]
    last_slot_int32 = emit("Cast", last_slot, to=ir.DataType.INT32, name="last_slot_int32").outputs[0]
    # All Q tokens of a row are written, padding too, as the standard graph does.
    batch = emit("Shape", last_slot, name="batch").outputs[0]
    tokens_int32 = emit("Cast", tokens, to=ir.DataType.INT32, name="tokens_int32").outputs[0]
    row_tokens = emit("Expand", tokens_int32, batch, name="row_tokens").outputs[0]
    longest = emit("ReduceMax", last_slot, zero, keepdims=1, name="longest").outputs[0]
    total = emit("Add", longest, one, name="total").outputs[0]
    scalar = emit("Squeeze", total, name="total_scalar").outputs[0]
    total_int32 = emit("Cast", scalar, to=ir.DataType.INT32, name="total_int32").outputs[0]
    rows = emit("Concat", one, one, tokens, one, axis=0, name="score_rows").outputs[0]
    return _Lengths(slots, tokens, row_tokens, last_slot_int32, total_int32, total, rows)


def first_user(graph: ir.Graph | ir.Function | None, *linears: Linear) -> ir.Node:
    """The node in front of which everything can stand that depends on the graph's inputs and the layer's state."""
    assert graph is not None
    wanted = {linear.output for linear in linears}
    return next(node for node in graph if any(output in wanted for output in node.outputs))


def _emit(layer: _Layer, index: int, lengths: _Lengths) -> None:
    emit = Emitter(layer.node, f"layers.{index}.attention")
    query, key, value = layer.query, layer.key, layer.value
    packed = emit("Concat", emit_norms(emit, query, key), value.output, axis=-1, name="qkv").outputs[0]
    written = emit("TensorScatter", layer.past[2], layer.score, lengths.first_slot, name="score")
    bias = _emit_bias(emit, layer, written.outputs[0], lengths)
    fused = emit(
        "GroupQueryAttention",
        packed,
        None,
        None,
        layer.past[0],
        layer.past[1],
        lengths.last_slot,
        lengths.total,
        query.cos,
        query.sin,
        layer.positions if layer.window else None,  # without a window positions are slots
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
    for old, new in zip(layer.present, (fused.outputs[1], fused.outputs[2], written.outputs[0]), strict=True):
        take_place(old, new)


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


def _emit_bias(emit: Emitter, layer: _Layer, score: ir.Value, lengths: _Lengths) -> ir.Value:
    """Scores of the slots in use, `[B, Hkv, L, 1]` -> `[B, 1 or H, Q, K]`."""
    zero, axis = emit.ints(0, name="zero"), emit.ints(2, name="slot_axis")
    used = emit("Slice", score, zero, lengths.total_1d, axis, name="used_scores").outputs[0]
    if layer.window:
        inputs = (used, lengths.first_slot, lengths.new)
        node = emit(WINDOW_BIAS, *inputs, domain=DOMAIN, name="bias", keep_window_size=layer.window)
        return node.outputs[0]
    heads, kv_heads = layer.query.heads, layer.key.heads
    if kv_heads > 1 and heads > kv_heads:
        head_map = emit.ints(*(head // (heads // kv_heads) for head in range(heads)), name="head_map")
        used = emit("Gather", used, head_map, axis=1, name="head_scores").outputs[0]
    shape = emit.ints(0, 0, 1, -1, name="row_shape")
    row = emit("Reshape", used, shape, name="score_row").outputs[0]
    return emit("Expand", row, lengths.score_rows, name="bias").outputs[0]
