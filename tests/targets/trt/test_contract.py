"""The path of --target trt against NVIDIA's own bindings, as far as they go without TensorRT: tensorrt_standin.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tensorrt_standin
from bundles import NoProgress, own_bundle

from doge_deploy.bundle.engine_record import EngineRecord
from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.options.build import BuildOptions
from doge_deploy.pipelines import build as building
from doge_deploy.targets.trt import choices
from doge_deploy.targets.trt import layout as layout_module
from doge_deploy.targets.trt.layout import LoweredLayout

pytestmark = pytest.mark.skipif(bool(tensorrt_standin.missing()), reason=tensorrt_standin.missing() or "complete")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle, and a process environment in which TensorRT seems to be installed beside a GPU."""
    folder = tmp_path / "tensorrt"
    folder.mkdir()
    tensorrt_standin.use(folder, monkeypatch)
    monkeypatch.setattr(building, "check_installed", lambda target: None)
    monkeypatch.setattr(building, "require_gpu", lambda target: None)
    monkeypatch.setattr(choices, "device_capability", lambda: "8.7")
    return own_bundle(tmp_path / "bundle", "doge-tiny", dtype="fp16", max_length=64)


def run(path: Path, **options: Any) -> EngineRecord:
    return building.build(path, BuildOptions(target="trt", **options), force=False, progress=NoProgress())


def test_a_build_without_plugins_goes_all_the_way(bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    record = run(bundle, plugins=False, timing_cache=str(cache), workspace_mib=256)
    assert record.version.startswith("11.")
    assert (record.product, record.lowering) == ("TensorRT", "standard")
    assert open_bundle(bundle).engine("trt-fp16-sm87-no-plugins") == record
    assert [profile.name for profile in record.profiles] == ["prefill", "decode"]
    assert (record.layers.kv_cache_update, record.layers.attention) == (9, 3)
    assert [tensor.name for tensor in record.inputs][:3] == ["input_ids", "write_indices", "sequence_lengths"]
    assert cache.stat().st_size > 0


def test_a_cache_of_the_window_too(bundle: Path, tmp_path: Path) -> None:
    path = own_bundle(tmp_path / "long", "doge-tiny", dtype="fp16")
    record = run(path, plugins=False)
    assert record.window == 64 and record.prefill is not None
    assert (record.layers.kv_cache_update, record.prefill.layers.kv_cache_update) == (9, 0)
    assert record.aliases["present.0.rank"] == "past_key_values.0.rank" and record.prefill.aliases == {}


def test_both_products_get_the_same_graph(bundle: Path) -> None:
    options = BuildOptions(target="trt-rtx")
    rtx = building.build(bundle, options, force=False, progress=NoProgress())
    trt = run(bundle, plugins=False)
    assert trt.lowered_onnx_sha256 == rtx.lowered_onnx_sha256
    assert trt.layers.by_type == rtx.layers.by_type


def test_a_plugin_that_tensorrt_does_not_know_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_plugin(opened: Bundle, layout: Layout, **choices: Any) -> LoweredLayout:
        model = ir.load(opened.path / layout.file)
        model.functions.clear()
        for node in model.graph:
            if node.domain == "doge":
                node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", "doge")
                node.attributes["plugin_version"] = ir.AttrString("plugin_version", "1")
        return LoweredLayout(model)

    monkeypatch.setattr(layout_module, "lower_layout", with_a_plugin)
    with pytest.raises(UnsupportedModelError, match=r"refuses the graph: node layers.0.DynamicMaskAttention"):
        run(bundle)
