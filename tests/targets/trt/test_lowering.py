"""The lowered graph: standard operators only, the same numbers, and refusals by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bundles import make_bundle

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.errors import MissingDependencyError, UnsupportedModelError
from doge_deploy.kernels import registry
from doge_deploy.kernels.registry import installed
from doge_deploy.kernels.spec import Limit
from doge_deploy.runtime.ort import open_runner
from doge_deploy.targets.trt.layout import LoweredLayout, lower_layout
from doge_deploy.targets.trt.lowering import lower


def lowered(bundle: Bundle) -> ir.Model:
    return lower_layout(bundle, bundle.layout("static"), use_plugins=False).model


def count(model: ir.Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph:
        assert node.domain in ("", "ai.onnx"), node
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_moe_bundle"])
def test_every_layer_has_its_native_operators(name: str, request: pytest.FixtureRequest) -> None:
    bundle = open_bundle(request.getfixturevalue(name))
    layers = bundle.manifest.facts.num_hidden_layers
    model = lowered(bundle)
    counts = count(model)
    assert not model.functions
    assert counts["TensorScatter"] == 3 * layers
    assert counts["Attention"] == layers
    assert counts["RotaryEmbedding"] == 2 * layers
    assert not any("softmax_precision" in node.attributes for node in model.graph)


def test_names_say_the_layer(tiny_bundle: Path) -> None:
    names = [node.name for node in lowered(open_bundle(tiny_bundle)).graph]
    assert len(set(names)) == len(names)
    assert {"Attention_0", "Attention_1", "Attention_2"} <= set(names)


def test_the_interface_is_that_of_the_signature(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    signature = bundle.layout("static").signature
    model = lowered(bundle)
    assert [value.name for value in model.graph.inputs] == [spec.name for spec in signature.inputs]
    assert [value.name for value in model.graph.outputs] == [spec.name for spec in signature.outputs]
    assert LoweredLayout(model).aliases() == {present.name: past.name for past, present in signature.past()}


def test_weights_stay_where_they_are(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    model = lowered(bundle)
    assert len(LoweredLayout(model).serialized()) < 200_000
    stored = (tiny_bundle / "weights.safetensors").stat().st_size
    assert 0 < LoweredLayout(model).weight_bytes() <= stored


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_moe_bundle"])
def test_the_lowered_graph_computes_the_same(name: str, request: pytest.FixtureRequest) -> None:
    bundle = open_bundle(request.getfixturevalue(name))
    runners = [
        open_runner(bundle, "static"),
        open_runner(bundle, "static", model=LoweredLayout(lowered(bundle)).serialized()),
    ]
    ids = np.random.default_rng(0).integers(0, bundle.manifest.facts.vocab_size, (2, 9))
    found = []
    for runner in runners:
        runner.reset(2)
        found.append([runner.run(ids, [9, 5]), runner.run(ids[:, :1])])
    for standard, other in zip(*found, strict=True):
        np.testing.assert_allclose(standard[:, -1], other[:, -1], rtol=0, atol=1e-5 * np.abs(standard).max())


def test_the_same_bundle_gives_the_same_bytes(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert LoweredLayout(lowered(bundle)).serialized() == LoweredLayout(lowered(bundle)).serialized()


def test_a_node_without_a_body_is_refused_by_name(tiny_bundle: Path) -> None:
    model = ir.load(tiny_bundle / "model.onnx")
    model.functions.clear()
    with pytest.raises(
        UnsupportedModelError, match=r"node layers.0.DynamicMaskAttention is doge::DynamicMaskAttention"
    ):
        lower(model)


def test_a_foreign_node_is_refused_although_there_are_plugins(tiny_bundle: Path) -> None:
    class Nothing:
        operator, namespace, version, plugin_names = "CDMoE", "doge", "1", ("doge_route",)

        def lower(self, model: ir.Model) -> ir.Model:
            model.functions.clear()
            return model

        def register(self, capabilities: object) -> None: ...

    with pytest.raises(UnsupportedModelError, match=r"known plugins: \[\('doge', 'doge_route'\)\]"):
        lower(ir.load(tiny_bundle / "model.onnx"), [Nothing()])


def test_a_window_beyond_top_k_is_refused_with_the_reason(tmp_path: Path) -> None:
    from random_doge import save_random_doge

    checkpoint = save_random_doge(tmp_path / "wide", keep_window_size=4000, max_position_embeddings=4096)
    bundle = open_bundle(make_bundle(checkpoint, tmp_path / "bundle"))
    assert bundle.layout("static").keep_window
    with pytest.raises(UnsupportedModelError, match="TopK at most 3840: keep_window_size=4000 needs the plugins"):
        lowered(bundle)


def test_a_window_beyond_top_k_that_cannot_be_reached_is_no_problem(tmp_path: Path) -> None:
    from random_doge import save_random_doge

    checkpoint = save_random_doge(tmp_path / "wide", keep_window_size=4000, max_position_embeddings=4096)
    bundle = open_bundle(make_bundle(checkpoint, tmp_path / "bundle", max_length=4000))
    assert "TopK" not in count(lowered(bundle))


def test_plugins_come_in_by_entry_point(tiny_moe_bundle: Path) -> None:
    bundle = open_bundle(tiny_moe_bundle)
    found = lower_layout(bundle, bundle.layout("static"), use_plugins=True)
    model = found.model
    assert [plugin.operator for plugin in found.plugins] == ["CDMoE", "DynamicMaskAttention"]
    layers = bundle.manifest.facts.num_hidden_layers
    counts = Counter(node.op_type for node in model.graph if node.domain == "doge")
    assert counts == dict.fromkeys(
        ("DynamicMaskSelect", "DynamicMaskSplitSelected", "DynamicMaskAttendSelected", "CDMoERoute", "CDMoEExperts"),
        layers,
    )
    assert not model.functions
    onnx.load_model_from_string(LoweredLayout(model).serialized())


def test_without_an_installed_plugin_the_remedies_are_named(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(MissingDependencyError, match=r"no plugin for DynamicMaskAttention is installed .*--no-plugins"):
        lower_layout(bundle, bundle.layout("static"), use_plugins=True)


def test_a_node_that_does_not_fit_its_plugin_is_refused_before_the_parser(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = next(spec for spec in installed().specs() if spec.name == "DynamicMaskSelect")
    monkeypatch.setitem(select.__dict__, "limits", (Limit(lambda values: values["K"] < 100, "K below 100"),))
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(UnsupportedModelError, match=r"K=512, .* is outside its limits: K below 100"):
        lower_layout(bundle, bundle.layout("static"), use_plugins=True)
