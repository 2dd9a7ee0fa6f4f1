"""The plugin lowering: which nodes an operator becomes, with which values between them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from plugin_graphs import attention_graph, moe_graph

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.check import check_model
from doge_deploy.graph.passes.plugin_chains import PluginChainPass
from doge_deploy.kernels.registry import Registry, installed, make_registry
from doge_deploy.kernels.spec import OperatorPlugin, Step
from doge_plugins.dynamic_mask_attention.spec import PLUGIN as ATTENTION


def lower(model: ir.Model, registry: Registry | None = None) -> ir.Model:
    return PluginChainPass(registry or installed())(model).model


@pytest.mark.parametrize(
    ("window", "masked", "nodes"),
    [
        (0, False, ["DynamicMaskSplit", "DynamicMaskAttend"]),
        (0, True, ["DynamicMaskSplitMasked", "DynamicMaskAttendMasked"]),
        (16, False, ["DynamicMaskSelect", "DynamicMaskSplitSelected", "DynamicMaskAttendSelected"]),
        (16, True, ["DynamicMaskSelectMasked", "DynamicMaskSplitSelected", "DynamicMaskAttendSelected"]),
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else "",
)
def test_attention_becomes_a_chain(window: int, masked: bool, nodes: list[str]) -> None:
    model = lower(attention_graph(window=window, masked=masked))
    assert [node.op_type for node in model.graph if node.op_type != "Cast"] == nodes


def test_values_between_the_nodes_have_dtype_and_shape() -> None:
    model = lower(attention_graph(window=16))
    found = {value.name: f"{value.dtype.name}{value.shape}" for node in model.graph for value in node.outputs}
    prefix = "layer.DynamicMaskAttention/"
    assert found == {
        prefix + "threshold": "FLOAT[B,2,Q]",
        prefix + "last_kept": "INT32[B,2,Q]",
        prefix + "kept": "INT32[B,2,cdiv(Q, 64),min(K, 79)]",
        prefix + "kept_count": "INT32[B,2,cdiv(Q, 64)]",
        prefix + "partial": "FLOAT[B,4,min(Q, 8),cdiv(min(K, 79), 128),64]",
        prefix + "maximum": "FLOAT[B,4,min(Q, 8),cdiv(min(K, 79), 128)]",
        prefix + "total": "FLOAT[B,4,min(Q, 8),cdiv(min(K, 79), 128)]",
        "mixed": "FLOAT16[B,4,Q,64]",
    }


def test_nodes_say_which_plugin_they_are() -> None:
    route, experts = lower(moe_graph()).graph
    assert route.name == "layer.CDMoE/CDMoERoute"
    assert {name: attribute.value for name, attribute in route.attributes.items()} == {
        "num_experts_per_tok": 8,
        "norm_topk_prob": 0,
        "routing": "reference",
        "plugin_namespace": "doge",
        "plugin_version": "1",
    }
    assert [value.name for value in experts.inputs] == [
        "hidden",
        "layer.CDMoE/expert_ids",
        "layer.CDMoE/expert_weights",
        "down",
        "up",
    ]


def test_no_plugin_leaves_the_graph_alone() -> None:
    model = moe_graph()
    result = PluginChainPass(make_registry([]))(model)
    assert not result.modified
    assert [node.op_type for node in model.graph] == ["CDMoE"]


def test_an_operator_without_an_attribute_is_an_error_that_names_it() -> None:
    model = attention_graph()
    model.graph[0].attributes.pop("scale")
    with pytest.raises(UnsupportedModelError, match=r"layer.DynamicMaskAttention.*no attribute 'scale'"):
        lower(model)


def test_a_chain_that_asks_for_what_is_not_there_is_an_error() -> None:
    def chain(attributes: Any, inputs: Any) -> tuple[Step, ...]:
        return (Step(ATTENTION.specs[0], ("score", "slots", "query"), ("a", "b", "c", "output"), {}),)

    registry = make_registry([(OperatorPlugin("DynamicMaskAttention", ATTENTION.specs, chain), "test")])
    with pytest.raises(UnsupportedModelError, match="doge::DynamicMaskSelect needs 'slots'; DynamicMaskAttention has"):
        lower(attention_graph(), registry)


def test_a_mask_is_cast_where_the_plugin_takes_integers() -> None:
    spec = next(spec for spec in ATTENTION.specs if spec.name == "DynamicMaskSelectMasked")
    spec = replace(spec, inputs=(*spec.inputs[:-1], replace(spec.inputs[-1], dtype="int32")))

    def chain(attributes: Any, inputs: Any) -> tuple[Step, ...]:
        names = ("score", "first_slot", "query", "key_mask")
        return (Step(spec, names, ("output", "a", "b", "c"), {"keep_window_size": 16, "rows": 64}),)

    registry = make_registry([(OperatorPlugin("DynamicMaskAttention", (spec,), chain), "test")])
    cast, select = lower(attention_graph(masked=True), registry).graph
    assert cast.op_type == "Cast"
    assert select.inputs[3] is cast.outputs[0]
    assert f"{cast.outputs[0].dtype.name}{cast.outputs[0].shape}" == "INT32[B,K]"


@pytest.mark.parametrize("layout", ["static", "growing"])
def test_a_bundle_keeps_its_signature_and_loses_its_bodies(tiny_moe_bundle: Path, tmp_path: Path, layout: str) -> None:
    chosen = open_bundle(tiny_moe_bundle).layout(layout)
    model = lower(ir.load(tiny_moe_bundle / chosen.file))
    assert not model.functions
    assert not {"DynamicMaskAttention", "CDMoE"} & {node.op_type for node in model.graph}
    file = tmp_path / "plugin.onnx"
    shutil.copy(tiny_moe_bundle / "weights.safetensors", tmp_path)
    ir.save(model, file)
    check_model(file, chosen.signature)
