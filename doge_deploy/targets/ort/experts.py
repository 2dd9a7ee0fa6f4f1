"""The routed experts of a mixture for ONNX Runtime's CPU provider."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from doge_deploy.config.expert_pairs import candidate_pairs
from doge_deploy.graph.schemas import CDMOE, DOMAIN, ROUTED_EXPERTS
from doge_deploy.targets.ort.experts_body import Routing, Table, routed_experts_function
from doge_deploy.targets.ort.matching import Emitter, attribute, expect, require_contrib, stored_half, take_place
from doge_deploy.targets.ort.quantized import match_quantized, views_of

ROWS_BYTES = 4 << 20
"""Most memory for the rows of one table that are looked up at once; tokens are mixed in chunks that keep to it."""

_ATTRIBUTES = {"num_experts_per_tok", "norm_topk_prob", "routing", "activation"}

_EXACT_IN_FLOAT = 1 << 24


class RoutedExpertsPass(ir.passes.InPlacePass):
    """doge::CDMoE -> doge::RoutedExperts, whose body is made for the CPU provider; see `experts_body`.

    Needs: every CDMoE as the trace writes it, in float32, with at most 2**24 experts: their ids pass through float32.
    Promises: the same experts, ties included, and the same sum in another order. Of a table that is not stored in
    float32 only the rows of the chosen experts are unpacked, and no call holds more than `ROWS_BYTES` of rows of a
    table (or those of one token), however many tokens it has.

    1. Fires on all mixtures of the graph or on none; on a graph without any there is nothing to do.
    2. Must not fire where the node has an attribute or a routing that this pass does not know.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == CDMOE]
        mixtures = [_match(node) for node in nodes]
        if not mixtures:
            return ir.passes.PassResult(model, False)
        routings = {mixture.routing for mixture in mixtures}
        expect(len(routings) == 1, "layers route differently")
        bodies = {(mixture.down, mixture.up) for mixture in mixtures}
        expect(len(bodies) == 1, "layers store their experts differently")
        routing, chunk = mixtures[0].routing, _chunk(mixtures[0].routing)
        shared = _emit_shared(mixtures[0], chunk)
        for index, mixture in enumerate(mixtures):
            _emit(mixture, index, shared)
        function = routed_experts_function(routing, mixtures[0].down, mixtures[0].up, chunk=chunk)
        model.functions[function.identifier()] = function
        require_contrib(model)
        return ir.passes.PassResult(model, True)


@dataclass(frozen=True)
class _Mixture:
    node: ir.Node
    routing: Routing
    down: Table
    up: Table


def _match(node: ir.Node) -> _Mixture:
    unknown = set(node.attributes) - _ATTRIBUTES
    expect(not unknown, f"CDMoE has attributes that are not known here: {', '.join(sorted(unknown))}")
    mode = attribute(node, "routing")
    expect(mode in ("reference", "per-token"), f"routing {mode!r} is not known here")
    hidden, _, down, up = node.inputs[:4]
    expect(hidden is not None and hidden.dtype in (None, ir.DataType.FLOAT), "the model is not float32")
    assert down is not None and up is not None
    sized = all(table.shape is not None and table.shape.is_static() and len(table.shape) == 2 for table in (down, up))
    expect(sized and down.shape == up.shape, "the expert tables have no fixed shape, or two")
    assert up.shape is not None
    experts, columns = up.shape.numpy()
    keys, top = math.isqrt(experts), attribute(node, "num_experts_per_tok")
    expect(experts <= _EXACT_IN_FLOAT, f"{experts} experts: their ids are no float32 numbers")
    routing = Routing(
        mode,
        keys,
        top,
        tuple(candidate_pairs(top, keys)),
        bool(attribute(node, "norm_topk_prob")),
        attribute(node, "activation"),
        columns,
    )
    return _Mixture(node, routing, _table(down), _table(up))


def _table(value: ir.Value) -> Table:
    producer = value.producer()
    weight = match_quantized(producer) if producer is not None else None
    if weight is None:
        return Table(("table",), half=stored_half(value) is not None)
    parts = ("rows", "scale") if weight.has_middle_zero else ("rows", "scale", "zero_point")
    return Table(parts, weight.bits, weight.block)


def _parts(value: ir.Value, graph: ir.Graph) -> list[ir.Value]:
    """What `_table` names, as values."""
    producer = value.producer()
    weight = match_quantized(producer) if producer is not None else None
    if weight is None:
        return [stored_half(value) or value]
    views = views_of(graph, weight)
    return [views.rows, weight.scale, *([views.zero_point] if views.zero_point else [])]


def _chunk(routing: Routing) -> int:
    """Tokens that are mixed at once."""
    return max(1, ROWS_BYTES // (4 * routing.top * routing.hidden))


def _emit_shared(first: _Mixture, chunk: int) -> list[ir.Value]:
    """Inputs that all layers share: the shape of the state, whether it has more than `chunk` tokens, and two constant
    matrices, which ONNX Runtime folds.
    """
    emit = Emitter(first.node, "experts")
    shape = emit("Shape", first.node.inputs[0], name="hidden_shape").outputs[0]
    rows = emit("Shape", first.node.inputs[0], start=0, end=2, name="rows_shape").outputs[0]
    tokens = emit("ReduceProd", rows, keepdims=0, name="tokens").outputs[0]
    limit = emit("Constant", name="chunk", value_int=chunk).outputs[0]
    many = emit("Greater", tokens, limit, name="many").outputs[0]
    pairs = first.routing.pairs
    ranks = emit.ints(*(i for i, _ in pairs), *(j for _, j in pairs), name="ranks")
    by_half = emit("Reshape", ranks, emit.ints(2, -1, name="by_half"), name="ranks_by_half").outputs[0]
    reach = emit.ints(max(i for i, _ in pairs) + 1, name="reach")
    values = emit("Constant", name="off_on", value_floats=[0.0, 1.0]).outputs[0]
    by_rank = emit("OneHot", by_half, reach, values, axis=1, name="by_rank").outputs[0]  # [2, reach, P]
    factors = emit("Constant", name="factors", value_floats=[float(first.routing.keys), 1.0]).outputs[0]
    per_half = emit("Reshape", factors, emit.ints(2, 1, 1, name="per_half"), name="factor_per_half").outputs[0]
    weighted = emit("Mul", by_rank, per_half, name="weighted").outputs[0]
    flat = emit.ints(-1, len(pairs), name="flat")
    scores = emit("Reshape", by_rank, flat, name="pair_of_scores").outputs[0]
    keys = emit("Reshape", weighted, flat, name="pair_of_keys").outputs[0]
    return [shape, many, scores, keys]


def _emit(mixture: _Mixture, index: int, shared: list[ir.Value]) -> None:
    node = mixture.node
    hidden, router_logits, down, up, *weights = node.inputs
    graph = node.graph
    assert isinstance(graph, ir.Graph) and down is not None and up is not None
    emit = Emitter(node, f"layers.{index}.experts")
    inputs = (hidden, router_logits, *shared, *_parts(down, graph), *_parts(up, graph), *weights)
    routed = emit(ROUTED_EXPERTS, *inputs, domain=DOMAIN, name="mixed").outputs[0]
    take_place(node.outputs[0], routed)
