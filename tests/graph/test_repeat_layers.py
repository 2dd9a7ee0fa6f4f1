"""Layers that are repeated against layers that are all traced: the same bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
from random_doge import DYNAMIC, LONGROPE, SMALL, SMALL_MOE
from sweeps import cases

from doge_deploy.bundle.signature import UNCACHED, make_signature, uncached_signature
from doge_deploy.config.model import DogeFacts
from doge_deploy.config.revisions import REVISIONS
from doge_deploy.graph import trace as tracing
from doge_deploy.graph.repeat_layers import TRACED_LAYERS, UnlikeLayersError, repeat_layers

LAYERS = 7
LEGACY = next(name for name, revision in REVISIONS.items() if revision.score_per_query_head)

CONFIGS: dict[str, dict[str, Any]] = {
    "static": {},
    "growing": {"layout": "growing"},
    "mixture": {"is_moe": True},
    "mixture-growing-per-token": {"is_moe": True, "layout": "growing", "routing": "per-token"},
    "all-logits": {"last_logits": False},
    "bfloat16": {"dtype": "bfloat16"},
    "never-drops": {"max_length": 8},
    "sliding": {"sliding_window": 6},
    "sliding-growing": {"sliding_window": 6, "layout": "growing"},
    "trained-activation": {"hidden_act": "xielu"},
    "longrope-growing": {"rope_parameters": LONGROPE, "layout": "growing"},
    "rope-memory": {"rope_parameters": DYNAMIC, "max_length": 80, "max_position_embeddings": 32},
    "untied": {"tie_word_embeddings": False},
    "legacy": {"revision": LEGACY},
    "features": {"task": "features", "layout": UNCACHED},
    "classes": {
        "task": "sequence-classification",
        "layout": UNCACHED,
        "architectures": ["DogeForSequenceClassification"],
        "id2label": {"0": "no", "1": "yes"},
    },
}


def trace(every_layer: bool, layers: int = LAYERS, **options: Any) -> ir.Model:
    options = {"layout": "static", "dtype": "float32", "max_length": 32, "routing": "reference", **options}
    task, last_logits = options.pop("task", "causal-lm"), options.pop("last_logits", True)
    layout, dtype, length, routing = (options.pop(key) for key in ("layout", "dtype", "max_length", "routing"))
    revision = options.pop("revision", None)
    config = {**(SMALL_MOE if options.get("is_moe") else SMALL), **options, "num_hidden_layers": layers}
    facts = DogeFacts.from_config({"model_type": "doge", **config})
    if revision is not None:
        facts = replace(facts, revision=revision)
    if layout == UNCACHED:
        signature = uncached_signature(facts, task, dtype=dtype, max_length=length)
    else:
        signature = make_signature(facts, layout, dtype=dtype, max_length=length, last_logits=last_logits)
    return tracing.trace(
        facts,
        signature,
        dtype=dtype,
        max_length=length,
        routing=routing,
        last_logits=last_logits,
        task=task,
        every_layer=every_layer,
    )


def content(model: ir.Model) -> bytes:
    """The model's file, its weights without numbers, as a trace has them."""
    for name, value in model.graph.initializers.items():
        assert value.dtype is not None
        shape = ir.Shape(value.shape or ())
        value.const_value = ir.ExternalTensor("weights", 0, 0, value.dtype, shape=shape, name=name, base_dir="")
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.mark.parametrize("options", cases(CONFIGS, always=("static", "mixture-growing-per-token", "rope-memory")))
def test_repeated_layers_are_traced_layers(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = content(trace(every_layer=True, **options))
    traced = []
    export = tracing._MODELS[options.get("layout", "static")]

    def counted(facts: DogeFacts, **arguments: Any) -> Any:
        traced.append(facts.num_hidden_layers)
        return export(facts, **arguments)

    monkeypatch.setitem(tracing._MODELS, options.get("layout", "static"), counted)
    assert content(trace(every_layer=False, **options)) == whole
    assert traced == [TRACED_LAYERS]


def test_the_axes_of_every_value_are_named_as_in_the_signature() -> None:
    model = trace(every_layer=False, layout="growing")
    names = {
        axis
        for node in model.graph
        for value in node.outputs
        for axis in value.shape or ()
        if not isinstance(axis, int) and axis.value is not None
    }
    assert {str(axis.value) for axis in names} == {
        "batch_size",
        "sequence_length",
        "past_sequence_length + sequence_length",
    }


def plant(model: ir.Model, change: str) -> None:
    """Make the third layer of a trace unlike the second."""
    norm = next(
        node
        for node in model.graph
        if any(value is not None and value.name == "model.layers.2.input_layernorm.weight" for value in node.inputs)
    )
    if change == "attribute":
        norm.attributes.add(ir.AttrFloat32("epsilon", 0.5))
    elif change == "operator":
        norm.op_type = "LpNormalization"
    elif change == "one more node":
        model.graph.insert_after(norm, ir.Node("", "Relu", norm.outputs, outputs=[ir.Value(name="relu_5")]))
    elif change == "a node less":
        model.graph.remove(next(node for node in model.graph if node.outputs[0].name == "softplus_2"))
    elif change == "other input":
        norm.replace_input_with(0, next(iter(model.graph)).outputs[0])
    else:
        norm.outputs[0].name = "rms_norm_77"


@pytest.mark.parametrize("change", ["attribute", "operator", "one more node", "a node less", "other input", "name"])
def test_layers_that_differ_are_not_repeated(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = tracing._convert
    refused = []

    def planted(*arguments: Any, **options: Any) -> ir.Model:
        model = convert(*arguments, **options)
        if len(refused) == 0:
            plant(model, change)
            with pytest.raises(UnlikeLayersError) as caught:
                repeat_layers(model, LAYERS)
            refused.append(str(caught.value))
        return model

    monkeypatch.setattr(tracing, "_convert", planted)
    found = content(trace(every_layer=False))
    assert refused
    monkeypatch.undo()
    assert found == content(trace(every_layer=True))
