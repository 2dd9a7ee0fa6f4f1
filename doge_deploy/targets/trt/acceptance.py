"""Why a product cannot build an engine of a model: what follows from facts, before a graph is lowered.

`build` refuses for these reasons, and `doctor` tells them of models that nobody has exported yet. What can only be seen
in a graph is found by `doge_deploy.targets.trt.lowering` and by the vendor's parser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from doge_deploy.config.keys import TRAINED_ACTIVATIONS
from doge_deploy.config.model import DogeFacts
from doge_deploy.devices.tensorrt_limits import TOPK_LIMIT
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.weight_formats import WeightFormat
from doge_deploy.kernels import symbols
from doge_deploy.kernels.preflight import PluginNode, check_node
from doge_deploy.kernels.registry import Registry
from doge_deploy.kernels.spec import OperatorPlugin
from doge_deploy.kernels.symbols import Dimension
from doge_deploy.targets.trt.bounded.choices import window_of

DOMAIN = "doge"


@dataclass(frozen=True)
class Refusal:
    """One reason why no engine can be built."""

    reason: str
    remedy: str


def refusals(
    facts: DogeFacts,
    *,
    target: str,
    dtype: str,
    max_length: int,
    routing: str,
    weight_format: WeightFormat | None,
    inlined: bool,
    plugins: Registry | None,
) -> Iterator[Refusal]:
    """Everything that keeps `target` from building an engine of a static graph, the most fundamental first.

    Args:
        facts: the model.
        target: `trt` or `trt-rtx`.
        dtype: of the graph, `DType.name`.
        max_length: slots of a row.
        routing: of a mixture: `reference` or `per-token`.
        weight_format: how matrices are stored; None for `dtype`.
        inlined: the graph calls no local functions.
        plugins: what operators are lowered with; None for the standard lowering. An operator without a plugin is not
            looked at.
    """
    if weight_format is not None and (reason := weight_format.target_refusal(target)):
        yield Refusal(reason, weight_format.target_remedy(target))
    elif weight_format is not None and plugins is not None and facts.is_moe:
        yield Refusal(
            f"its expert tables are stored as {weight_format.name}, and the plugins take them in {dtype}",
            "build with --no-plugins",
        )
    window, sliding = facts.reachable_windows(max_length)
    if plugins is None:
        if window > TOPK_LIMIT and not window_of(facts, max_length, inlined=inlined):
            yield Refusal(
                f"keep_window_size {window} is more than TensorRT's TopK takes ({TOPK_LIMIT})",
                f"export with --max-length {window}, which needs no selection, or use ort",
            )
        return
    if inlined:
        yield Refusal(
            "its graph has no local functions (--inline-functions), and plugins take the place of these",
            "build with --no-plugins, or export without --inline-functions",
        )
    for operator, attributes, inputs in _operators(facts, dtype, routing, window, sliding):
        plugin = plugins.operator(DOMAIN, operator)
        if plugin is None:
            continue
        for problem in _problems(plugin, attributes, inputs, dtype, plugins):
            yield Refusal(f"the plugins do not take the model: {problem}", "build with --no-plugins, or use ort")


_Inputs = Mapping[str, tuple[str, Sequence[Dimension]]]
"""Dtype and shape by name."""


def _operators(
    facts: DogeFacts, dtype: str, routing: str, window: int, sliding: int
) -> Iterator[tuple[str, dict[str, Any], _Inputs]]:
    """The `doge` operators of a layer as the static graph has them: name, attributes, inputs."""
    size, kv_heads = facts.head_dim, facts.num_key_value_heads
    attributes: dict[str, Any] = {"keep_window_size": window, "scale": size**-0.5}
    if sliding:
        attributes["sliding_window"] = sliding
    yield (
        "DynamicMaskAttention",
        attributes,
        {
            "query": (dtype, ("batch", facts.num_attention_heads, "tokens", size)),
            "key": (dtype, ("batch", kv_heads, "slots", size)),
            "value": (dtype, ("batch", kv_heads, "slots", size)),
            "score": ("float32", ("batch", facts.num_score_heads, "slots", 1)),
            "first_slot": ("int64", ("batch",)),
        },
    )
    if not facts.is_moe:
        return
    activation_weights = TRAINED_ACTIVATIONS.get(facts.hidden_act, {})
    yield (
        "CDMoE",
        {
            "num_experts_per_tok": facts.num_experts_per_tok,
            "norm_topk_prob": int(facts.norm_topk_prob),
            "routing": routing,
            "activation": facts.hidden_act,
        },
        {
            "hidden": (dtype, ("batch", "tokens", facts.hidden_size)),
            "router_logits": (dtype, ("batch", "tokens", 2 * facts.num_keys)),
            "down_embed": (dtype, (facts.num_experts, facts.hidden_size)),
            "up_embed": (dtype, (facts.num_experts, facts.hidden_size)),
            **{f"act_fn_{index}": (dtype, shape) for index, shape in enumerate(activation_weights.values())},
        },
    )


def _problems(
    plugin: OperatorPlugin, attributes: Mapping[str, Any], inputs: _Inputs, dtype: str, plugins: Registry
) -> Iterator[str]:
    """What is wrong with the chain of nodes that stands for one operator."""
    try:
        chain = plugin.chain(attributes, frozenset(inputs))
    except UnsupportedModelError as error:
        yield str(error)
        return
    known = dict(inputs)
    for step in chain:
        spec = step.spec
        dtypes, shapes = zip(*(known[name] for name in step.inputs), strict=True)
        node = PluginNode(
            name=spec.name,
            plugin=spec.name,
            namespace=spec.namespace,
            version=spec.version,
            attributes=step.attributes,
            dtypes=dtypes,
            shapes=shapes,
            num_outputs=len(spec.outputs),
        )
        problems = check_node(node, plugins).problems
        yield from (f"{spec.name}: {problem}" for problem in problems)
        if problems:
            return
        sizes = {**symbols.bind([tensor.shape for tensor in spec.inputs], shapes), **step.attributes}
        for name, tensor in zip(step.outputs, spec.outputs, strict=True):
            shape = [symbols.dimension(size, sizes) for size in tensor.shape]
            known[name] = (dtype if tensor.dtype == "T" else tensor.dtype, shape)
