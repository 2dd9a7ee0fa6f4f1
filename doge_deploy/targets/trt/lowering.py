"""The graph that TensorRT's parser gets.

One lowering serves both products. Without plugins every `doge` node is replaced by its body, whose operators of opset
24 TensorRT maps to native layers: TensorScatter to KV_CACHE_UPDATE, Attention to the fused attention layer with the
dynamic mask as its float mask, RotaryEmbedding to ROTARY_EMBEDDING. Numbers that could leave the range of float16 need
no help here: the bodies compute score and router in the dtype that holds them, and hide keys by half of the lowest
number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from doge_deploy.devices.tensorrt_limits import TOPK_LIMIT
from doge_deploy.diagnostics import join_findings
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.passes.name_nodes import NameNodesPass
from doge_deploy.targets.trt.bounded.lowering import BoundedAttentionPass
from doge_deploy.targets.trt.head_norms import OneHeadNormPass
from doge_deploy.targets.trt.plugins import PluginLowering
from doge_deploy.targets.trt.rounded_inputs import DYNAMIC_QUANTIZE, TENSORRT, RoundInputsPass

_STANDARD_DOMAINS = ("", "ai.onnx")


def lower(
    model: ir.Model,
    plugins: Sequence[PluginLowering] = (),
    *,
    round_inputs: bool = True,
    bounded: BoundedAttentionPass | None = None,
) -> ir.Model:
    """The graph of a static layout as TensorRT takes it; weights stay where they are.

    Args:
        model: a bundle's graph. It is changed.
        plugins: lowerings for `doge` operators that become plugin nodes; the others are inlined.
        round_inputs: with weights of few bits round the other side of products too, where their format says so. Without
            it the graph computes what the standard one does.
        bounded: gives the graph a cache of the window.

    Raises:
        UnsupportedModelError: a node that neither a body nor a plugin stands for, or a number beyond TensorRT's limits.
    """
    if bounded is not None:
        model = bounded(model).model
    for plugin in plugins:
        model = plugin.lower(model)
    model = ir.passes.Sequential(
        common.InlinePass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        NativeAttentionPass(),
        OneHeadNormPass(),
        *((RoundInputsPass(),) if round_inputs else ()),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        NameNodesPass(),
    )(model).model
    findings = [*_without_implementation(model, plugins), *_beyond_top_k(model)]
    if findings:
        raise UnsupportedModelError(join_findings(findings))
    return model


class NativeAttentionPass(ir.passes.InPlacePass):
    """Write `Attention` so that TensorRT's parser takes it as its native layer.

    Needs: functions inlined. Promises: the same numbers up to rounding, in a form that the parser does not refuse.

    1. Drops `softmax_precision`, which the parser refuses ("Setting softmax precision is not supported"). Its fused
       kernels keep the sums of a softmax in float32 themselves.
    2. Must not drop another attribute, nor fire where the node has a past or a present: those are not caches of ours.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type == "Attention" and node.domain in _STANDARD_DOMAINS and len(node.outputs) == 1:
                modified |= node.attributes.pop("softmax_precision", None) is not None
        return ir.passes.PassResult(model, modified)


def _without_implementation(model: ir.Model, plugins: Sequence[PluginLowering]) -> Iterator[str]:
    """Nodes outside standard ONNX that no plugin of ours put there. TensorRT-RTX would not refuse such a node but end
    the process.
    """
    known = {(plugin.namespace, name) for plugin in plugins for name in plugin.plugin_names}
    known.add((TENSORRT, DYNAMIC_QUANTIZE))
    for node in model.graph:
        if node.domain in _STANDARD_DOMAINS:
            continue
        namespace = node.attributes.get_string("plugin_namespace", node.domain)
        if (namespace, node.op_type) not in known:
            names = sorted((plugin.namespace, one) for plugin in plugins for one in plugin.plugin_names)
            hint = "; there is no body and no plugin for it" if not plugins else f"; known plugins: {names}"
            yield f"node {node.name} is {node.domain}::{node.op_type}, which is not standard ONNX{hint}"


def _beyond_top_k(model: ir.Model) -> Iterator[str]:
    for node in model.graph:
        if node.op_type == "TopK" and node.domain in _STANDARD_DOMAINS:
            k = _upper_bound(node.inputs[1])
            if k is not None and k > TOPK_LIMIT:
                yield (
                    f"node {node.name} selects the {k} best, TensorRT's TopK at most {TOPK_LIMIT}: "
                    f"keep_window_size={k} needs the plugins (--target trt), or an export "
                    "whose --max-length does not exceed the window"
                )


def _upper_bound(value: ir.Value | None) -> int | None:
    """The largest number that a TopK's K can be: of a constant itself, of a minimum the least known one."""
    if value is None:
        return None
    known = ir.convenience.get_const_tensor(value)
    if known is not None:
        return int(known.numpy().reshape(-1)[0])
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Min":
        bounds = [bound for bound in map(_upper_bound, node.inputs) if bound is not None]
        return min(bounds, default=None)
    if node.op_type in ("Unsqueeze", "Squeeze", "Identity", "Reshape", "Cast"):
        return _upper_bound(node.inputs[0])
    if node.op_type == "Constant":
        for name in ("value_int", "value_ints"):
            if name in node.attributes:
                attribute = node.attributes[name]
                return int(attribute.as_int() if name == "value_int" else attribute.as_ints()[0])
    return None
