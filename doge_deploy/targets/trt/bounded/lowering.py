"""A static graph with a cache of the window: one graph for decoding, one for prefill."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from doge_deploy.bundle.signature import BATCH, CACHE_ROWS, RANK, SEQUENCE_LENGTHS
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.schemas import DOMAIN, DYNAMIC_MASK_ATTENTION
from doge_deploy.targets.trt.bounded.bodies import KEPT_POSITIONS, KEPT_UNTIL, OUTPUTS, PREFILL, bounded_function

_Three = tuple[ir.Value, ir.Value, ir.Value]


@dataclass(frozen=True)
class _Layer:
    """Keys, values and scores: the cache, those of the new tokens, and the cache with them."""

    node: ir.Node
    writes: tuple[ir.Node, ...]
    past: _Three
    new: _Three
    present: _Three


class BoundedAttentionPass(ir.passes.InPlacePass):
    """Every DynamicMaskAttention, with the writing of its cache, becomes one that keeps w slots.

    Needs: a static graph with one score per key head and without a sliding window.
    Promises: the same keys kept for every token, ties to the earliest token; the same attention over them. Inputs and
    outputs are those of `doge_deploy.bundle.signature.bounded`.

    Args:
        kind: `DECODE`: a call has one token, and the cache is written in place. `PREFILL`: up to `longest_call`
            tokens, of which those after the real ones are padding; the cache is an output of its own.
        window: w.
        longest_call: of PREFILL.
        exposed: of PREFILL: outputs `kept_until.<layer>` and `kept_positions.<layer>` show what its tokens see.
    """

    def __init__(self, kind: str, *, window: int, longest_call: int, exposed: bool = False) -> None:
        super().__init__()
        self.kind, self.window, self.longest_call, self.exposed = kind, window, longest_call, exposed

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == DYNAMIC_MASK_ATTENTION]
        layers = [_match(node) for node in nodes]
        if not layers:
            raise UnsupportedModelError("the graph has no attention whose cache can be bounded by the window")
        heads, kv_heads = (int(value.shape[1]) for value in (layers[0].node.inputs[0], layers[0].past[0]))  # type: ignore
        function = bounded_function(
            self.kind,
            heads=heads,
            kv_heads=kv_heads,
            window=self.window,
            longest_call=self.longest_call,
            hidden_dtype=layers[0].past[0].dtype,  # type: ignore[arg-type]
        )
        model.functions[function.identifier()] = function
        position = inputs["write_indices"]
        if self.kind == PREFILL:
            extra = [_raw_lengths(graph, position)]
        else:
            extra = []
            inputs["input_ids"].shape = ir.Shape([BATCH, 1])
        for layer in layers:
            self._replace(layer, [position, *extra])
        return ir.passes.PassResult(model, True)

    def _replace(self, layer: _Layer, told: list[ir.Value]) -> None:
        graph, node = layer.node.graph, layer.node
        assert isinstance(graph, ir.Graph)
        for past in layer.past:
            assert past.name is not None and past.shape is not None
            stem, _, kind = past.name.rpartition(".")
            is_score = kind == "score"
            past.shape = ir.Shape([CACHE_ROWS, 1, self.window, 2 if is_score else past.shape[3]])
            past.name = f"{stem}.{RANK}" if is_score else past.name
        made = ir.node(
            self.kind,
            [node.inputs[0], *layer.new, told[0], *layer.past, *told[1:]],
            {"scale": node.attributes["scale"]},
            domain=DOMAIN,
            num_outputs=len(OUTPUTS) + 2 * (self.kind == PREFILL),
            name=node.name,
        )
        graph.insert_before(node, made)
        node.outputs[0].replace_all_uses_with(made.outputs[0])
        made.outputs[0].name, node.outputs[0].name = node.outputs[0].name, None
        for past, old, new in zip(layer.past, layer.present, made.outputs[1:4], strict=True):
            assert past.name is not None
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = None, past.name.replace("past_key_values.", "present.", 1)
            new.shape, new.type = past.shape, past.type
        graph.remove([node, *layer.writes], safe=True)
        if self.exposed and self.kind == PREFILL:
            number = str(layer.past[0].name).split(".")[1]
            for name, value in zip((KEPT_UNTIL, KEPT_POSITIONS), made.outputs[4:], strict=True):
                value.name, value.type = f"{name}.{number}", ir.TensorType(ir.DataType.FLOAT)
                graph.outputs.append(value)


def _match(node: ir.Node) -> _Layer:
    """A layer, as the trace writes it.

    Raises:
        UnsupportedModelError: it looks otherwise.
    """
    writes = [None if value is None else value.producer() for value in node.inputs[1:4]]
    found = [write for write in writes if write is not None and write.op_type == "TensorScatter"]
    position = node.inputs[4] if len(node.inputs) == 5 else None
    heads = {value.shape[1] for write in found if (value := write.inputs[0]) is not None and value.shape is not None}
    if len(found) != 3 or position is None or len(heads) != 1 or "sliding_window" in node.attributes:
        raise UnsupportedModelError(f"node {node.name} is not an attention whose cache can be bounded by the window")
    if any(write.inputs[2] is not position for write in found):
        raise UnsupportedModelError(f"node {node.name} sees other slots than those that are written")
    past, new, present = zip(*((write.inputs[0], write.inputs[1], write.outputs[0]) for write in found), strict=True)
    return _Layer(node, tuple(found), past, new, present)


def _raw_lengths(graph: ir.Graph, position: ir.Value) -> ir.Value:
    """How many tokens of each row are real, maybe none; what is computed of the last one gets at least 1."""
    for value in graph.inputs:
        if value.name == SEQUENCE_LENGTHS:
            first = next(node for node in graph if value in node.inputs)
            one = ir.node("Constant", [], {"value_ints": [1]}, name="one_token")
            at_least = ir.node("Max", [value, one.outputs[0]], name="lengths_of_logits")
            one.outputs[0].name, at_least.outputs[0].name = "one_token", "lengths_of_logits"
            value.replace_all_uses_with(at_least.outputs[0])
            at_least.replace_input_with(0, value)
            graph.insert_before(first, [one, at_least])
            return value
    lengths = ir.Value(name=SEQUENCE_LENGTHS, shape=ir.Shape([BATCH]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.insert(1 + list(graph.inputs).index(position), lengths)
    return lengths
