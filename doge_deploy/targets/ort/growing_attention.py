"""Dynamic mask attention of the growing layout as ONNX Runtime's GroupQueryAttention."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from doge_deploy.bundle.signature import SHARES_BUFFERS
from doge_deploy.graph.schemas import CDMOE, DOMAIN, DYNAMIC_MASK_ATTENTION, WINDOW_BIAS
from doge_deploy.targets.ort.grouped_query import (
    HEADS_FIRST,
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
    match_linear,
    producer,
    require_contrib,
    take_place,
)
from doge_deploy.targets.ort.window import HIDDEN_BIAS, window_bias_function


@dataclass(frozen=True)
class _Layer(FusedLayer):
    past: tuple[ir.Value, ir.Value]
    """Key and value, `[B, Hkv, P, D]`."""
    present: tuple[ir.Value, ir.Value]
    """The same and the new tokens, `[B, Hkv, K, D]`: graph outputs."""
    states: ir.Value
    """All values with heads merged, `[B, K, Hkv*D]`: what the score is computed from."""
    score_product: ir.Node
    """The product of `states` by dt_proj."""
    score: ir.Value
    """Scores of all tokens, `[B, Hkv, K, 1]`."""
    token_score: ir.Value
    """The same as they were computed, `[B, K, Hkv]`."""
    key_mask: ir.Value
    """`[B, K]` bool."""


@dataclass(frozen=True)
class _Lengths(FusedLengths):
    """Every row holds P + Q slots."""

    new: ir.Value
    """Q, `[1]` int64."""
    past: ir.Value
    """P, `[1]` int64."""
    first_slot: ir.Value
    """P for each row, `[B]` int64."""
    visible: ir.Value
    """`key_mask` for every new token, `[B, 1, Q, K]`."""


class FuseGrowingAttentionPass(ir.passes.InPlacePass):
    """Everything between the three projections and the output projection becomes one GroupQueryAttention.

    That operator rotates queries and keys, appends keys and values to the past, and attends. What is padding in a
    growing cache stays in it, so to the operator every row holds P + Q slots; padding is hidden by the bias, which
    holds the scores elsewhere. Later tokens are hidden by the operator itself, which is causal.

    Past and present may also be the same buffers, of any size: P + Q is the width of `attention_mask`, and slots beyond
    are neither read nor written. Then nothing is copied; the model's metadata say so (`SHARES_BUFFERS`).

    The scores of past and new values are computed apart and joined: the joined values leave the operator only.

    Needs: the growing layout without a sliding window; heads of a multiple of 16; every DynamicMaskAttention as the
    trace writes it, in float32; ONNX Runtime 1.32, see `attention.FUSED_ATTENTION_SINCE`.
    Promises: graph inputs and outputs as before; the same sum of products and the same softmax, in another order; the
    same keys kept, ties to the lowest slot.

    1. Fires on all layers or on none.
    2. Must not fire where what padding gets matters: there a token sees no key, and the operator averages other values
       than the standard graph. A mixture with the routing of the reference mixes it with the tokens.
    3. Must not fire where the present is not past and new tokens, whole and in that order, or where the node has an
       input or attribute that this pass does not know.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        ours = [node for node in model.graph if node.domain == DOMAIN]
        mixes = any(node.op_type == CDMOE and attribute(node, "routing") != "per-token" for node in ours)
        expect(not mixes, "experts are routed as in the reference, which mixes padding with tokens")
        nodes = [node for node in ours if node.op_type == DYNAMIC_MASK_ATTENTION]
        layers = [_match(node) for node in nodes]
        expect_one_window([layer.window for layer in layers])
        shared = {(layer.key_mask, layer.query.positions) for layer in layers}
        expect(len(shared) == 1, "layers have masks or positions of their own")
        if layers[0].window:
            function = window_bias_function(layers[0].query.heads, layers[0].key.heads, key_mask=True)
            model.functions[function.identifier()] = function
        lengths = _emit_lengths(layers[0])
        for index, layer in enumerate(layers):
            _emit(layer, index, lengths)
        model.metadata_props[SHARES_BUFFERS] = "1"
        require_contrib(model)
        return ir.passes.PassResult(model, True)


def _match(node: ir.Node) -> _Layer:
    expect_known(node, 6)
    query, key, value, score, first_slot, key_mask = node.inputs
    query_head = match_head(query, "the query")
    past_key, new_key = _appended(key, "the key")
    past_value, new_value = _appended(value, "the value")
    key_head = match_head(new_key, "the new key")
    value_linear = match_value(new_value)
    expect_alike(query_head, key_head, value_linear)
    expect(query_head.positions is key_head.positions, "query and key have different positions")
    expect(query_head.positions.is_graph_input(), "positions are computed")
    expect(all(past.dtype == ir.DataType.FLOAT for past in (past_key, past_value)), "the caches are not float32")
    assert score is not None and key is not None and value is not None
    product, token_score = _score_product(score)
    states = product.inputs[0]
    merged = producer(states, "Reshape", "the state of the score")
    heads_last = producer(merged.inputs[0], "Transpose", "the state of the score")
    whole = attribute(heads_last, "perm") == HEADS_FIRST and heads_last.inputs[0] is value
    expect(whole, "the score is not computed from the values")
    expect(_is_length(first_slot, past_key), "the first slot is not the length of the past")
    assert key_mask is not None and states is not None
    expect(_mask_input(key_mask) is not None, "the mask of keys is computed otherwise")
    output = match_output(node)
    return _Layer(
        node=node,
        query=query_head,
        key=key_head,
        value=value_linear,
        new_key=new_key,
        output=output,
        window=attribute(node, "keep_window_size"),
        past=(past_key, past_value),
        present=(key, value),
        states=states,
        score_product=product,
        score=score,
        token_score=token_score,
        key_mask=key_mask,
    )


def _appended(value: ir.Value | None, what: str) -> tuple[ir.Value, ir.Value]:
    """The past, a graph input, and the new tokens that a Concat joins."""
    concat = producer(value, "Concat", what)
    expect(attribute(concat, "axis") == 2 and len(concat.inputs) == 2, f"{what} is not past and new tokens")
    past, new = concat.inputs
    if past is None or new is None or not past.is_graph_input():
        raise Declined(f"{what} does not begin with a graph input")
    expect(concat.outputs[0].is_graph_output(), f"{what} is not the present")
    return past, new


def _is_length(first_slot: ir.Value | None, past: ir.Value) -> bool:
    """Whether `first_slot` is the length of a past, for each row: all layers' are equally long."""
    expand = producer(first_slot, "Expand", "the first slot")
    shape = producer(expand.inputs[0], "Shape", "the first slot")
    source = shape.inputs[0]
    of_past = source is not None and source.is_graph_input() and source.shape == past.shape
    return of_past and attribute(shape, "start") == 2 and attribute(shape, "end") == 3


def _mask_input(key_mask: ir.Value) -> ir.Value | None:
    """The graph input that a mask of keys comes from, `[B, P + Q]`; None where it is no plain comparison of one."""
    node = key_mask.producer()
    while node is not None and node.op_type in ("Not", "Equal"):
        value = node.inputs[0]
        if value is None or value.is_graph_input():
            return value
        node = value.producer()
    return None


def _score_product(score: ir.Value) -> tuple[ir.Node, ir.Value]:
    """The product by dt_proj, and exp(A * softplus(product (+ bias))), which is the score with heads last."""
    unsqueeze = producer(score, "Unsqueeze", "the score")
    heads_first = producer(unsqueeze.inputs[0], "Transpose", "the score")
    expect(constant_ints(unsqueeze.inputs[1]) in ((3,), (-1,)), "the score has another form")
    expect(attribute(heads_first, "perm") == (0, 2, 1), "the score is transposed otherwise")
    scaled = producer(producer(heads_first.inputs[0], "Exp", "the score").inputs[0], "Mul", "the exponent of the score")
    product: ir.Node = match_linear(
        producer(scaled.inputs[1], "Softplus", "the exponent of the score").inputs[0], "dt"
    ).product
    expect(product.op_type == "MatMul" and len(product.outputs[0].uses()) == 1, "dt is not a plain product")
    exp = heads_first.inputs[0]
    assert exp is not None
    return product, exp


def _emit_lengths(layer: _Layer) -> _Lengths:
    emit = Emitter(first_user(layer.node.graph, layer.query.linear, layer.key.linear, layer.value), "lengths")
    one = emit.ints(1, name="one")
    tokens = emit("Shape", layer.query.positions, start=1, end=2, name="tokens").outputs[0]
    batch = emit("Shape", layer.query.positions, start=0, end=1, name="batch").outputs[0]
    total = emit("Shape", layer.key_mask, start=1, end=2, name="total").outputs[0]
    past = emit("Sub", total, tokens, name="past").outputs[0]
    first_slot = emit("Expand", past, batch, name="first_slot").outputs[0]
    last = emit("Sub", total, one, name="last").outputs[0]

    def int32(value: ir.Value, name: str) -> ir.Value:
        return emit("Cast", value, to=ir.DataType.INT32, name=f"{name}_int32").outputs[0]

    row_tokens = emit("Expand", int32(tokens, "tokens"), batch, name="row_tokens").outputs[0]
    last_slot = emit("Expand", int32(last, "last"), batch, name="last_slot").outputs[0]
    scalar = emit("Squeeze", int32(total, "total"), name="total_scalar").outputs[0]
    row = emit("Unsqueeze", layer.key_mask, emit.ints(1, 2, name="mask_axes"), name="visible_row").outputs[0]
    rows = emit("Concat", one, one, tokens, one, axis=0, name="mask_rows").outputs[0]
    visible = emit("Expand", row, rows, name="visible").outputs[0]
    return _Lengths(
        tokens=row_tokens,
        last_slot=last_slot,
        total=scalar,
        new=tokens,
        past=past,
        first_slot=first_slot,
        visible=visible,
    )


def _emit(layer: _Layer, index: int, lengths: _Lengths) -> None:
    _split_score(layer, index, lengths)
    emit = Emitter(layer.node, f"layers.{index}.attention")
    packed = emit_packed(emit, layer)
    bias = _emit_bias(emit, layer, lengths)
    present = emit_attention(emit, layer, packed, layer.past, layer.query.positions, bias, lengths)
    for old, new in zip(layer.present, present, strict=True):
        take_place(old, new)


def _split_score(layer: _Layer, index: int, lengths: _Lengths) -> None:
    """dt of past and of new values in the place of that of the joined ones, which only leave the fused operator.

    The past lies head by head, `[B, Hkv, P, D]`, and is read as it lies: a product per head, then their sum.
    """
    product = layer.score_product
    emit = Emitter(product, f"layers.{index}.score")
    heads, weight = layer.key.heads, product.inputs[1]
    sizes = emit.ints(heads, layer.value.width // heads, -1, name="head_sizes")
    by_head = emit("Reshape", weight, sizes, name="weight").outputs[0]  # ONNX Runtime folds it
    zero, axis = emit.ints(0, name="zero"), emit.ints(2, name="slot_axis")
    used = emit("Slice", layer.past[1], zero, lengths.past, axis, name="past_values").outputs[0]
    past = emit("MatMul", used, by_head, name="past_products").outputs[0]
    head_axis = emit.ints(1, name="head_axis")
    if heads == 1:  # nothing to add up: the same numbers, not copied
        past = emit("Squeeze", past, head_axis, name="past_dt").outputs[0]
    else:
        past = emit("ReduceSum", past, head_axis, keepdims=0, name="past_dt").outputs[0]
    new = emit("MatMul", layer.value.output, weight, name="new_dt").outputs[0]
    joined = emit("Concat", past, new, axis=1, name="dt")
    take_place(product.outputs[0], joined.outputs[0])


def _emit_bias(emit: Emitter, layer: _Layer, lengths: _Lengths) -> ir.Value:
    """Scores of all tokens, `[B, Hkv, K, 1]` -> `[B, 1 or H, Q, K]`."""
    if layer.window:
        inputs = (layer.score, lengths.first_slot, lengths.new, layer.key_mask)
        node = emit(WINDOW_BIAS, *inputs, domain=DOMAIN, name="bias", keep_window_size=layer.window)
        return node.outputs[0]
    score, heads, kv_heads = layer.score, layer.query.heads, layer.key.heads
    if kv_heads > 1 and heads > kv_heads:
        head_map = emit.ints(*(head // (heads // kv_heads) for head in range(heads)), name="head_map")
        score = emit("Gather", score, head_map, axis=1, name="head_scores").outputs[0]
    if kv_heads == 1:  # heads first or last is the same, so nothing is copied
        score, shape = layer.token_score, emit.ints(0, 1, 1, -1, name="row_shape")
    else:
        shape = emit.ints(0, 0, 1, -1, name="row_shape")
    row = emit("Reshape", score, shape, name="score_row").outputs[0]
    hidden = emit("Constant", name="hidden", value_float=HIDDEN_BIAS).outputs[0]
    return emit("Where", lengths.visible, row, hidden, name="bias").outputs[0]
