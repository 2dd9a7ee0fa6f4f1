"""Faults put into bundles, and where and why the localiser must find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import torch
from bundles import edit_tensor, own_bundle

from doge_deploy.bundle.files import WEIGHTS_FILE, file_entries
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.graph.stages import mark, marked, points_of
from doge_deploy.targets.ort import grouped_query, norms
from doge_deploy.targets.ort.lower import lower as lower_for_ort

Edit = Callable[[ir.Model], None]
BOTH = ("standard", "lowered")


@dataclass(frozen=True)
class Fault:
    """One fault: what is changed, and what must be said of it."""

    model: str
    options: dict[str, Any]
    case: str
    call: int
    layer: int | None
    stage: str
    columns: tuple[str, ...]
    reason: str
    standard: Edit | None = None
    """Done to the standard graph alone."""
    lowered: Edit | None = None
    """Done to the lowered graph alone."""
    weights: Callable[[Path], None] | None = None
    """Done to the weight file."""
    lowering: Callable[[], Any] | None = None
    """Under which the standard graph is lowered again."""
    detail: str = ""
    """Words of the reason."""
    blames: str = ""
    """Words of what is at fault."""
    portable: bool = field(default=False)
    """The standard graph is judged first."""

    def plant(self, target: Path) -> Path:
        """A bundle that has the fault."""
        bundle = own_bundle(target, self.model, **self.options)
        opened = open_bundle(bundle)
        layout = opened.layout()
        file = bundle / layout.file
        low = next((low.file for low in layout.lowered.values() if low.file), None)
        if self.lowering is not None:
            assert low is not None
            with self.lowering():
                ir.save(lower_for_ort(ir.load(file)).model, bundle / low)
        for path, edit in ((file, self.standard), (bundle / low if low else None, self.lowered)):
            if edit is not None:
                assert path is not None
                graph = ir.load(path)
                edit(graph)
                ir.save(graph, path)
        if self.weights is not None:
            self.weights(bundle / WEIGHTS_FILE)
        write_manifest(bundle, replace(opened.manifest, files=file_entries(bundle)))
        return bundle


def value_of(model: ir.Model, point: str) -> ir.Value:
    return next(value for value, points in marked(model) if point in points)


def node_of(model: ir.Model, point: str) -> ir.Node:
    """The node that computes a point."""
    node = value_of(model, point).producer()
    assert node is not None
    return node


def upstream(model: ir.Model, point: str, op_type: str) -> ir.Node:
    """The nearest node of that operator before a point."""
    queue = [node_of(model, point)]
    while queue:
        node = queue.pop(0)
        if node.op_type == op_type:
            return node
        queue += [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    raise AssertionError(f"{point} is not made by any {op_type}")


def attribute(point: str, name: str, value: Any, op_type: str | None = None) -> Edit:
    """Set an attribute of the node that makes a point, or of the nearest of that operator before it."""

    def edit(model: ir.Model) -> None:
        node = node_of(model, point) if op_type is None else upstream(model, point, op_type)
        node.attributes[name] = ir.convenience.convert_attributes({name: value})[0]

    return edit


def weight(point: str, old: str, new: str) -> Edit:
    """Let what makes a point read another weight."""

    def edit(model: ir.Model) -> None:
        known = model.graph.initializers
        value = known[old]
        users = [use for use in value.uses() if use.node is node_of(model, point) or _feeds(use.node, point, model)]
        assert users
        for use in users:
            use.node.replace_input_with(use.idx, known[new])

    return edit


def _feeds(node: ir.Node, point: str, model: ir.Model) -> bool:
    target = node_of(model, point)
    return any(value.producer() is node for value in target.inputs if value is not None)


def reads(point: str, old: str, new: str) -> Edit:
    """Let what makes a point read another point."""

    def edit(model: ir.Model) -> None:
        before, after = value_of(model, old), value_of(model, new)
        target = node_of(model, point)
        makers = [target, *(value.producer() for value in target.inputs if value is not None)]
        users = [use for use in before.uses() if use.node in makers]
        assert users
        for use in users:
            use.node.replace_input_with(use.idx, after)

    return edit


def operator(point: str, old: str, new: str) -> Edit:
    """Another operator in the place of the nearest `old` before a point."""

    def edit(model: ir.Model) -> None:
        node = upstream(model, point, old)
        made = ir.node(new, list(node.inputs))
        made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        assert isinstance(node.graph, ir.Graph)
        node.graph.insert_before(node, made)
        node.outputs[0].replace_all_uses_with(made.outputs[0])
        node.graph.remove(node, safe=True)

    return edit


def times(point: str, *factors: float) -> Edit:
    """The stage multiplies what it gives, factor after factor."""

    def edit(model: ir.Model) -> None:
        value = value_of(model, point)
        points, uses = points_of(value), list(value.uses())
        node = value.producer()
        assert node is not None and isinstance(node.graph, ir.Graph) and value.dtype is not None
        last, result = node, value
        for factor in factors:
            constant = ir.node("Constant", [], {"value": ir.tensor(np.array(factor, value.dtype.numpy()))})
            product = ir.node("Mul", [result, constant.outputs[0]])
            product.outputs[0].type, product.outputs[0].shape = value.type, value.shape
            node.graph.insert_after(last, [constant, product])
            last, result = product, product.outputs[0]
        for use in uses:
            use.node.replace_input_with(use.idx, result)
        mark(value, ())
        mark(result, points)

    return edit


def swap_inputs(point: str, op_type: str, one: int, two: int) -> Edit:
    def edit(model: ir.Model) -> None:
        node = upstream(model, point, op_type)
        first, second = node.inputs[one], node.inputs[two]
        node.replace_input_with(one, second)
        node.replace_input_with(two, first)

    return edit


def body(name: str, *replacements: tuple[str, str]) -> Edit:
    """Another text of the body of a local function, value by value: `x = Op (a, b)` as in ONNX's text form."""

    def edit(model: ir.Model) -> None:
        import onnx.parser
        import onnx.printer

        identifier = next(one for one in model.functions if one[1] == name)
        text = onnx.printer.to_text(ir.to_proto(model.functions[identifier]))
        for old, new in replacements:
            assert text.count(old) == 1, (old, text)
            text = text.replace(old, new)
        model.functions[identifier] = ir.serde.deserialize_function(onnx.parser.parse_function(text))

    return edit


def moved(weight_name: str, to: str) -> Edit:
    """An initializer that points to the bytes of another tensor."""

    def edit(model: ir.Model) -> None:
        value, other = model.graph.initializers[weight_name], model.graph.initializers[to]
        old, new = value.const_value, other.const_value
        assert isinstance(old, ir.ExternalTensor) and isinstance(new, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            old.location, new.offset, old.length, old.dtype, shape=old.shape, name=weight_name, base_dir=old.base_dir
        )

    return edit


def tensor(name: str, change: Callable[[torch.Tensor], None]) -> Callable[[Path], None]:
    return lambda path: edit_tensor(path, name, change)


def one_percent(tensor: torch.Tensor) -> None:
    index = tensor.abs().flatten().argmax()
    tensor.view(-1)[index] *= 1.01


def roll(path: Path) -> None:
    for name in ("rope_cos", "rope_sin"):
        edit_tensor(path, name, lambda table: table.copy_(table.roll(1, 0)))


def swap_halves_of_split(point: str) -> Edit:
    """Two parts of a packed product of the same width change places, as a pass that packs may do."""

    def edit(model: ir.Model) -> None:
        node = node_of(model, point)
        one, two = node.outputs[0], node.outputs[1]
        first, second = list(one.uses()), list(two.uses())
        for use in first:
            use.node.replace_input_with(use.idx, two)
        for use in second:
            use.node.replace_input_with(use.idx, one)
        names = points_of(one), points_of(two)
        mark(one, names[1])
        mark(two, names[0])  # the weights stay in their order: that is the fault

    return edit


@contextmanager
def norms_with_another_epsilon() -> Iterator[None]:
    """FuseNormsPass forgets the epsilon."""

    def attribute_of(node: ir.Node, name: str, default: Any = None) -> Any:
        found = node.attributes.get(name)
        return 1e-2 if name == "epsilon" else default if found is None else found.value

    with patch.object(norms, "attribute", attribute_of):
        yield


@contextmanager
def attention_with_weights_the_other_way() -> Iterator[None]:
    """FuseAttentionPass lays the weights of the norms of keys over queries, and the other way round."""
    right = grouped_query.emit_norms

    def wrong(emit: Any, query: Any, key: Any) -> ir.Value:
        value = right(emit, query, key)
        product = value.producer()
        assert product is not None and product.inputs[1] is not None
        concat = product.inputs[1].producer()
        assert concat is not None
        first, second = concat.inputs
        concat.replace_input_with(0, second)
        concat.replace_input_with(1, first)
        return value

    with patch.object(grouped_query, "emit_norms", wrong):
        yield


L = "model.layers"
DENSE: tuple[str, dict[str, Any]] = ("doge-tiny", {"logits": "all"})
MOE: tuple[str, dict[str, Any]] = ("doge-tiny-moe", {"logits": "all"})
GROWING: tuple[str, dict[str, Any]] = ("doge-tiny", {"kv_cache": ("growing",)})
INT8: tuple[str, dict[str, Any]] = ("doge-tiny", {"quantize": "int8"})
HALF: tuple[str, dict[str, Any]] = ("doge-tiny", {"dtype": "fp16"})
OTHER = "other arithmetic"
ONE = ("standard",)
LOW = ("lowered",)

REVERSED_TOPK = (
    "best_score, best_index = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (ranked, window_reach)",
    """back = Constant <value_ints: ints = [-1]> ()
   far = Constant <value_ints: ints = [-9223372036854775807]> ()
   turned = Slice (ranked, back, far, back, back)
   best_score, turned_index = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (turned, window_reach)
   last_column = Sub (columns_scalar, one)
   best_index = Sub (last_column, turned_index)""",
)

FAULTS: dict[str, Fault] = {
    "embedding-weight": Fault(
        *DENSE,
        "prefill",
        0,
        None,
        "embedding",
        BOTH,
        "wrong weight",
        weights=tensor("model.embed_tokens.weight", lambda t: t.mul_(1.001)),
        detail="model.embed_tokens.weight",
        blames="weight file",
    ),
    "input-norm-epsilon": Fault(
        *DENSE,
        "prefill",
        0,
        1,
        "input_norm",
        ONE,
        OTHER,
        standard=attribute("layers.1.input_norm", "epsilon", 0.01),
        portable=True,
    ),
    "q-weight-one-percent": Fault(
        *DENSE,
        "decode",
        0,
        0,
        "q",
        BOTH,
        "wrong weight",
        weights=tensor(f"{L}.0.self_attn.q_proj.weight.T", one_percent),
        detail="1 of 16384 numbers",
        blames="weight file",
    ),
    "k-weight-of-another-layer": Fault(
        *DENSE,
        "batch of 2",
        0,
        2,
        "k",
        ONE,
        "wrong weight",
        standard=weight("layers.2.k", f"{L}.2.self_attn.k_proj.weight.T", f"{L}.1.self_attn.k_proj.weight.T"),
        portable=True,
        detail=f"reads {L}.1.self_attn.k_proj.weight.T",
    ),
    "v-weight-from-another-place": Fault(
        *DENSE,
        "chunked prefill",
        0,
        1,
        "v",
        LOW,
        "wrong weight",
        lowered=moved(f"{L}.1.self_attn.v_proj.weight.T", f"{L}.0.self_attn.v_proj.weight.T"),
        detail="from the place of",
    ),
    "norm-weights-the-other-way-in-a-fused-pass": Fault(
        *DENSE,
        "prefill",
        0,
        0,
        "q_norm",
        LOW,
        OTHER,
        lowering=attention_with_weights_the_other_way,
        blames="FuseAttentionPass",
    ),
    "k-norm-epsilon-quantised": Fault(
        *INT8,
        "prefill",
        0,
        0,
        "k_norm",
        ONE,
        OTHER,
        standard=attribute("layers.0.k_norm", "epsilon", 0.01),
    ),
    "rope-cos-for-sin": Fault(
        *DENSE,
        "prefill",
        0,
        2,
        "rope",
        ONE,
        OTHER,
        standard=swap_inputs("layers.2.rope_k", "RotaryEmbedding", 1, 2),
        portable=True,
    ),
    "rope-interleaved-in-the-fused-node": Fault(
        *DENSE,
        "decode",
        0,
        1,
        "rope",
        LOW,
        OTHER,
        lowered=attribute("layers.1.attention", "rotary_interleaved", 1),
        blames="FuseAttentionPass",
    ),
    "rope-tables-shifted": Fault(
        *DENSE,
        "prefill",
        0,
        0,
        "rope",
        BOTH,
        "wrong weight",
        weights=roll,
        detail="rope_cos",
    ),
    "score-without-softplus": Fault(
        *MOE,
        "prefill",
        0,
        1,
        "score",
        ONE,
        OTHER,
        standard=operator("layers.1.score", "Softplus", "Relu"),
        portable=True,
    ),
    "score-weight": Fault(
        *DENSE,
        "window decode",
        0,
        2,
        "score",
        BOTH,
        "wrong weight",
        weights=tensor(f"{L}.2.self_attn.dt_proj.weight.T", one_percent),
        detail="dt_proj",
    ),
    "selection-of-one-key-too-many": Fault(
        *DENSE,
        "window K=w+1",
        0,
        1,
        "selection",
        ONE,
        "wrong selection",
        standard=attribute("layers.1.attention", "keep_window_size", 65, "DynamicMaskAttention"),
        portable=True,
    ),
    "selection-of-one-key-too-few-lowered": Fault(
        *DENSE,
        "window decode",
        1,
        2,
        "selection",
        LOW,
        "wrong selection",
        lowered=attribute("layers.2.attention", "keep_window_size", 63, "WindowBias"),
        blames="FuseAttentionPass",
    ),
    "selection-by-the-wrong-tie": Fault(
        *DENSE,
        "natural text",
        0,
        0,
        "selection",
        ONE,
        "tie",
        standard=body("DynamicMaskAttention", REVERSED_TOPK),
        portable=True,
        detail="scores the same and comes first",
    ),
    "attention-scale": Fault(
        *MOE,
        "decode",
        0,
        1,
        "attention",
        ONE,
        OTHER,
        standard=attribute("layers.1.attention", "scale", 0.17, "DynamicMaskAttention"),
        portable=True,
    ),
    "attention-scale-lowered": Fault(
        *DENSE,
        "window decode",
        0,
        0,
        "attention",
        LOW,
        OTHER,
        lowered=attribute("layers.0.attention", "scale", 0.17),
        blames="FuseAttentionPass",
    ),
    "o-proj-growing": Fault(
        *GROWING,
        "batch of 2",
        0,
        1,
        "o_proj",
        ONE,
        OTHER,
        standard=times("layers.1.o_proj", 1.01),
        portable=True,
    ),
    "residual-reads-the-norm": Fault(
        *DENSE,
        "prefill",
        0,
        1,
        "residual",
        ONE,
        "wrong input",
        standard=reads("layers.1.residual", "layers.0.mlp_residual", "layers.1.input_norm"),
        portable=True,
        detail="input_norm instead of the layer's input",
    ),
    "post-norm-epsilon-of-a-pass": Fault(
        *DENSE,
        "prefill",
        0,
        0,
        "post_norm",
        LOW,
        OTHER,
        lowering=norms_with_another_epsilon,
        blames="FuseNormsPass",
    ),
    "gate-packed-in-another-order": Fault(
        *DENSE,
        "decode",
        0,
        1,
        "gate",
        LOW,
        OTHER,
        lowered=swap_halves_of_split("layers.1.gate"),
        blames="PackLinearsPass",
    ),
    "up-overflows-in-fp16": Fault(
        *HALF,
        "prefill",
        0,
        1,
        "up",
        ONE,
        "fp16 overflow",
        standard=times("layers.1.up", 3000.0, 3000.0),
        detail="beyond 65504",
    ),
    "activation-hard": Fault(
        *INT8,
        "decode",
        0,
        1,
        "activation",
        LOW,
        OTHER,
        lowered=operator("layers.1.activation", "Sigmoid", "HardSigmoid"),
    ),
    "down-nan": Fault(
        *DENSE,
        "prefill",
        0,
        2,
        "down",
        BOTH,
        "NaN origin",
        weights=tensor(f"{L}.2.mlp.down_proj.weight.T", lambda t: t.view(-1)[5].fill_(float("nan"))),
        detail="down_proj",
    ),
    "router-weight-of-another-layer": Fault(
        *MOE,
        "prefill",
        0,
        1,
        "router",
        ONE,
        "wrong weight",
        standard=weight("layers.1.router", f"{L}.1.mlp.router_gate.weight.T", f"{L}.0.mlp.router_gate.weight.T"),
        portable=True,
    ),
    "experts-halves-swapped": Fault(
        *MOE,
        "prefill",
        0,
        0,
        "selection",
        ONE,
        "wrong selection",
        portable=True,
        standard=body(
            "CDMoE",
            ("pair_row = Mul (pair_key_x, num_keys)", "pair_row = Mul (pair_key_y, num_keys)"),
            ("pair_expert = Add (pair_row, pair_key_y)", "pair_expert = Add (pair_row, pair_key_x)"),
        ),
    ),
    "experts-table": Fault(
        *MOE,
        "decode",
        0,
        1,
        "experts",
        BOTH,
        "wrong weight",
        weights=tensor(f"{L}.1.mlp.up_embed.weight", lambda t: t.mul_(1.01)),
        detail="up_embed",
    ),
    "mlp-residual-scale-of-attention": Fault(
        *DENSE,
        "prefill",
        0,
        0,
        "residual",
        ONE,
        "wrong weight",
        standard=weight("layers.0.mlp_residual", f"{L}.0.post_attention_residual", f"{L}.0.input_residual"),
        portable=True,
        detail="post_attention_residual",
    ),
    "norm-denormal": Fault(
        *DENSE,
        "prefill",
        0,
        None,
        "norm",
        ONE,
        "denormal",
        standard=times("norm", 1e-22, 1e-21, 1e21, 1e22),
        portable=True,
    ),
    "head-scaled-lowered": Fault(
        *DENSE,
        "prefill",
        0,
        None,
        "head",
        LOW,
        OTHER,
        lowered=attribute("head", "alpha", 1.01),
        blames="TiedHeadPass",
    ),
}

ALWAYS = (
    "q-weight-one-percent",
    "norm-weights-the-other-way-in-a-fused-pass",
    "selection-by-the-wrong-tie",
    "up-overflows-in-fp16",
    "experts-halves-swapped",
)
"""In every run; the others only in `make test-full`."""
