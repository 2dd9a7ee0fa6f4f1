"""Dynamic mask attention as ONNX Runtime's GroupQueryAttention."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from doge_deploy.bundle.signature import BATCH, SLOT_INDICES, SLOTS
from doge_deploy.graph.schemas import DOMAIN, DYNAMIC_MASK_ATTENTION, WINDOW_BIAS
from doge_deploy.targets.ort.grouped_query import (
    FusedLayer,
    FusedLengths,
    emit_attention,
    emit_packed,
    expect_alike,
    expect_known,
    expect_one_window,
    first_user,
    match_head,
    match_output,
    match_value,
)
from doge_deploy.targets.ort.matching import (
    Declined,
    Emitter,
    attribute,
    constant_ints,
    expect,
    producer,
    require_contrib,
    take_place,
)
from doge_deploy.targets.ort.window import window_bias_function


@dataclass(frozen=True)
class _Layer(FusedLayer):
    write_indices: ir.Value
    past: tuple[ir.Value, ir.Value, ir.Value]
    """Key, value and score buffers."""
    score: ir.Value
    """Scores of the new tokens `[B, Hkv, Q, 1]`."""
    present: tuple[ir.Value, ir.Value, ir.Value]
    positions: ir.Value
    """Of the new tokens, `[B, Q]`."""


@dataclass(frozen=True)
class _Lengths(FusedLengths):
    first_slot: ir.Value
    """Slot of the first new token of each row, `[B]`."""
    new: ir.Value
    """Q, `[1]` int64."""
    total_1d: ir.Value
    """`total` as `[1]` int64."""
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
        node=node,
        query=query_head,
        key=key_head,
        value=value_linear,
        new_key=new_key,
        output=output,
        window=attribute(node, "keep_window_size"),
        write_indices=write_indices,
        past=past,  # type: ignore[arg-type]
        score=new_score,
        present=tuple(scatter.outputs[0] for scatter in scatters),  # type: ignore[arg-type]
        positions=query_head.positions,
    )


def _scatter(value: ir.Value | None, what: str) -> ir.Node:
    node = producer(value, "TensorScatter", what)
    linear = attribute(node, "mode", "linear") == "linear" and attribute(node, "axis", -2) == -2
    expect(linear, f"{what} is not written slot after slot")
    expect(node.inputs[0] is not None and node.inputs[0].is_graph_input(), f"{what} is not written into a buffer")
    return node


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
    return _Lengths(
        tokens=row_tokens,
        last_slot=last_slot_int32,
        total=total_int32,
        first_slot=slots,
        new=tokens,
        total_1d=total,
        score_rows=rows,
    )


def _emit(layer: _Layer, index: int, lengths: _Lengths) -> None:
    emit = Emitter(layer.node, f"layers.{index}.attention")
    packed = emit_packed(emit, layer)
    written = emit("TensorScatter", layer.past[2], layer.score, lengths.first_slot, name="score").outputs[0]
    bias = _emit_bias(emit, layer, written, lengths)
    positions = layer.positions if layer.window else None  # without a window positions are slots
    key, value = emit_attention(emit, layer, packed, layer.past[:2], positions, bias, lengths)
    for old, new in zip(layer.present, (key, value, written), strict=True):
        take_place(old, new)


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
