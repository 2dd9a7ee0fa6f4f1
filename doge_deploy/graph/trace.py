"""torch.export -> ONNX, opset 24.

The model is traced on PyTorch's "meta" device: no weight is read, so the time and memory of a trace depend on the
number of layers alone. Initializers carry the names of the checkpoint's tensors; `graph/weights.py` gives them their
data.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.values import Opset

from doge_deploy.bundle.signature import CACHE_KINDS, GraphTensor, Signature
from doge_deploy.config.expert_pairs import candidate_pairs
from doge_deploy.config.model import DogeFacts
from doge_deploy.dtypes import DTYPES
from doge_deploy.graph import schemas
from doge_deploy.graph.functions import activation_function, cdmoe_function, dynamic_mask_attention_function
from doge_deploy.graph.functions.text import OPSET
from doge_deploy.graph.passes import run_passes
from doge_deploy.graph.repeat_layers import TRACED_LAYERS, UnlikeLayersError, repeat_layers
from doge_deploy.model.attention import hidden_bias
from doge_deploy.model.decoder import Doge, GrowingCausalLM, StaticCausalLM, UncachedDoge, Windows

_MODELS: dict[str, type[Doge]] = {"growing": GrowingCausalLM, "static": StaticCausalLM, "uncached": UncachedDoge}

# Sizes of the example inputs: any that differ from each other and from 0 and 1, which torch.export would specialise on.
_EXAMPLE_SIZES = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 5, "total_sequence_length": 11}

_standard = Opset("", OPSET)

_END = 2**63 - 1
"""Where a Slice to the end ends."""


def trace(
    facts: DogeFacts,
    signature: Signature,
    *,
    dtype: str,
    max_length: int,
    routing: str,
    last_logits: bool,
    task: str = "causal-lm",
    decompose: bool = False,
    every_layer: bool = False,
) -> ir.Model:
    """The ONNX model of one layout, weights by name only.

    Args:
        facts: the checkpoint; the graph has its `num_hidden_layers` layers.
        signature: what `make_signature` gives for the same arguments.
        dtype: "float32", "float16" or "bfloat16".
        max_length: positions (and slots of a static cache).
        routing: "reference" or "per-token".
        last_logits: logits of one token per row.
        task: what the graph is for.
        decompose: see `_convert`; the graph is the same.
        every_layer: trace all layers, where else four are traced and repeated; the graph is the same.
    """
    schemas.register_schemas()
    torch_dtype: torch.dtype = getattr(torch, dtype)
    windows = reachable_windows(facts, signature.layout, max_length)

    def traced(layers: int) -> ir.Model:
        few = replace(facts, num_hidden_layers=layers)
        with torch.device("meta"):
            model = _MODELS[signature.layout](
                few,
                max_length=max_length,
                windows=windows,
                routing=routing,
                last_logits=last_logits,
                dtype=torch_dtype,
                task=task,
            ).eval()
        arguments, dynamic = _example_arguments(few, signature)
        with quiet_exporter(), torch.no_grad():
            exported = torch.export.export(model, (), arguments, dynamic_shapes=dynamic, strict=False)
            converted = _convert(exported, decompose=decompose)
        _name_axes(converted, signature)
        return converted

    layers = facts.num_hidden_layers
    onnx_model = traced(layers) if every_layer else _of_all_layers(traced, layers)
    _apply_signature(onnx_model, signature)
    functions = [
        dynamic_mask_attention_function(
            facts,
            has_key_mask=signature.layout != "static",
            keep_window=bool(windows.keep),
            sliding=bool(windows.sliding),
            hidden_bias=hidden_bias(torch_dtype),
        ),
        activation_function(facts.hidden_act),
    ]
    if facts.is_moe:
        pairs = candidate_pairs(facts.num_experts_per_tok, facts.num_keys)
        functions.append(cdmoe_function(facts, routing=routing, pairs=pairs))
    for function in functions:
        onnx_model.functions[function.identifier()] = function
    return run_passes(onnx_model)


def _of_all_layers(traced: Callable[[int], ir.Model], layers: int) -> ir.Model:
    """What `traced(layers)` gives, of a shorter trace where its layers can be repeated."""
    if layers > TRACED_LAYERS:
        model = traced(TRACED_LAYERS)
        with contextlib.suppress(UnlikeLayersError):
            repeat_layers(model, layers)
            return model
    return traced(layers)


def reachable_windows(facts: DogeFacts, layout: str, max_length: int) -> Windows:
    """The checkpoint's windows as far as they can hide a key in a bundle of `max_length` tokens a row.

    Padding takes up slots of a growing cache, so there a sliding window can be left by shorter texts too.
    """
    return Windows(*facts.reachable_windows(max_length, padded=layout == "growing"))


def _convert(exported: torch.export.ExportedProgram, *, decompose: bool) -> ir.Model:
    """The exported program as ONNX.

    The exporter would first decompose the program, which traces it all over again: more than half of the time. Every
    operator of our models has a translation of its own, so that is not needed.
    """
    if not decompose:
        undecomposed = copy.copy(exported)
        undecomposed.run_decompositions = lambda table=None: exported
        exported = undecomposed
    program = torch.onnx.export(
        exported,
        (),
        dynamo=True,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
        custom_translation_table=_translations(),
    )
    assert program is not None  # only None for the legacy exporter
    return program.model


def _example_arguments(facts: DogeFacts, signature: Signature) -> tuple[dict[str, Any], dict[str, Any]]:
    """Meta tensors for every graph input, nested as the model's `forward` takes them, and their dynamic axes.

    Caches are those of the first `facts.num_hidden_layers` layers.
    """

    def example(spec: GraphTensor) -> torch.Tensor:
        # eval: "a + b" of axis names is the sum of their example sizes
        shape = [s if isinstance(s, int) else sum(_EXAMPLE_SIZES[p] for p in s.split(" + ")) for s in spec.shape]
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype), device="meta")

    def axes(spec: GraphTensor) -> dict[int, Any]:
        return {i: torch.export.Dim.DYNAMIC for i, s in enumerate(spec.shape) if isinstance(s, str)}

    arguments: dict[str, Any] = {}
    dynamic: dict[str, Any] = {}
    caches = [spec for spec, _ in signature.past()]
    for spec in signature.inputs:
        if spec not in caches:
            arguments[spec.name], dynamic[spec.name] = example(spec), axes(spec)
    if not caches:
        return arguments, dynamic
    kinds = len(CACHE_KINDS[signature.layout])
    layers = [caches[kinds * layer :][:kinds] for layer in range(facts.num_hidden_layers)]
    arguments["past_key_values"] = [tuple(example(spec) for spec in layer) for layer in layers]
    dynamic["past_key_values"] = [tuple(axes(spec) for spec in layer) for layer in layers]
    return arguments, dynamic


def _inputs_in_order(graph: ir.Graph, signature: Signature) -> list[ir.Value]:
    """The traced inputs in the order of the signature; caches may be those of the first layers alone."""
    caches = [spec for spec, _ in signature.past()]
    traced = {value.name: value for value in graph.inputs}
    plain = [traced[spec.name] for spec in signature.inputs if spec not in caches]
    return [*plain, *(value for value in graph.inputs if value not in plain)]


def _name_axes(model: ir.Model, signature: Signature) -> None:
    """Call the axes of all values as the signature does: the exporter numbers them, and those of each cache anew."""
    names: dict[str, str] = {}
    for spec, value in zip(signature.inputs, _inputs_in_order(model.graph, signature), strict=False):
        assert value.shape is not None
        for axis, dim in zip(spec.shape, value.shape, strict=True):
            if isinstance(axis, str) and isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                names.setdefault(dim.value, axis)

    def named(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dim, int) or dim.value is None:
            return dim
        text = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), dim.value)
        return ir.SymbolicDim(" + ".join(sorted(text.split(" + "))))  # else in the order of the exporter's numbers

    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([named(dim) for dim in value.shape])


def _apply_signature(model: ir.Model, signature: Signature) -> None:
    """Give the graph's inputs and outputs the names, order and symbolic axes of the signature."""
    graph = model.graph
    values = _inputs_in_order(graph, signature)
    graph.inputs.clear()
    graph.inputs.extend(values)
    for spec, value in zip(signature.inputs, values, strict=True):
        value.name, value.shape = spec.name, ir.Shape(spec.shape)
        value.dtype = ir.DataType(DTYPES[spec.dtype].onnx_number)
    for spec, value in zip(signature.outputs, graph.outputs, strict=True):
        value.name, value.shape = spec.name, ir.Shape(spec.shape)


def _translations() -> dict[Any, Any]:
    """How each operator of `doge_deploy.model` becomes a node; softplus too, whose PyTorch threshold float32 cannot
    see.
    """
    doge = Opset(schemas.DOMAIN, schemas.VERSION)
    op = _standard
    custom = torch.ops.doge

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def row_positions(first_slot: Any, input_ids: Any) -> Any:
        steps = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(input_ids, start=1)), op.Constant(value_int=1))
        return op.Add(op.Unsqueeze(first_slot, ints(1)), steps)

    def past_slots(input_ids: Any, past_key: Any) -> Any:
        return op.Expand(op.Shape(past_key, start=2, end=3), op.Shape(input_ids, start=0, end=1))

    def last_token(x: Any, lengths: Any) -> Any:
        index = op.Unsqueeze(op.Sub(lengths, op.Constant(value_int=1)), ints(1, 2))
        return op.GatherND(x, index, batch_dims=1)

    def last_unlike(x: Any, input_ids: Any, pad: int) -> Any:
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        columns = op.Range(zero, op.Squeeze(op.Shape(input_ids, start=1)), one)
        index = op.ReduceMax(op.Where(op.Equal(input_ids, op.Constant(value_int=pad)), zero, columns), ints(1))
        return op.GatherND(x, op.Unsqueeze(index, ints(1)), batch_dims=1)

    def no_past(input_ids: Any) -> Any:
        return op.Expand(ints(0), op.Shape(input_ids, start=0, end=1))

    def last_slots(x: Any, count: int) -> Any:
        return op.Slice(x, ints(-count), ints(_END), ints(2))

    def mask_of_slots(mask: Any, input_ids: Any, past_key: Any) -> Any:
        count = op.Add(op.Shape(input_ids, start=1, end=2), op.Shape(past_key, start=2, end=3))
        return op.Slice(mask, op.Neg(count), ints(_END), ints(1))

    def longest_position(position_ids: Any) -> Any:
        return op.Add(op.Reshape(op.ReduceMax(position_ids, keepdims=0), ints(1)), op.Constant(value_int=1))

    def to_dtype(x: Any, dtype: int) -> Any:  # the exporter gives dtypes as ONNX numbers
        return op.Cast(x, to=dtype) if x.dtype != dtype else op.Identity(x)

    def attention(  # type: ignore[no-untyped-def]
        query, key, value, score, first_slot, key_mask, keep_window_size, scale, sliding_window=0
    ):
        inputs = (query, key, value, score, first_slot) + (() if key_mask is None else (key_mask,))
        sliding = {"sliding_window": sliding_window} if sliding_window else {}
        return doge.DynamicMaskAttention(*inputs, keep_window_size=keep_window_size, scale=scale, **sliding)

    def cdmoe(hidden, router, down, up, act_fn, num_experts_per_tok, norm_topk_prob, routing, hidden_act):  # type: ignore[no-untyped-def]
        return doge.CDMoE(
            hidden,
            router,
            down,
            up,
            *act_fn,
            num_experts_per_tok=num_experts_per_tok,
            norm_topk_prob=int(norm_topk_prob),
            routing=routing,
            activation=hidden_act,
        )

    return {
        custom.rms_norm.default: lambda x, weight, epsilon: op.RMSNormalization(x, weight, epsilon=epsilon),
        custom.rotary_embedding.default: lambda x, cos, sin: op.RotaryEmbedding(x, cos, sin),
        custom.tensor_scatter.default: lambda cache, update, index: op.TensorScatter(cache, update, index),
        custom.split_heads.default: lambda x, heads: op.Reshape(x, ints(0, 0, heads, -1)),
        custom.merge_heads.default: lambda x: op.Reshape(x, ints(0, 0, -1)),
        custom.row_positions.default: row_positions,
        custom.past_slots.default: past_slots,
        custom.last_token.default: last_token,
        custom.last_slots.default: last_slots,
        custom.last_unlike.default: last_unlike,
        custom.no_past.default: no_past,
        custom.mask_of_slots.default: mask_of_slots,
        custom.longest_position.default: longest_position,
        custom.activation.default: lambda x, weights, name: doge.Activation(x, *weights),
        custom.dynamic_mask_attention.default: attention,
        custom.cdmoe.default: cdmoe,
        torch.ops.aten.to.dtype: to_dtype,
        torch.ops.aten.softplus.default: lambda x, beta=1.0, threshold=20.0: op.Softplus(x),
    }


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's own chatter (absent torchvision, deprecations inside torch) off the user's terminal."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
