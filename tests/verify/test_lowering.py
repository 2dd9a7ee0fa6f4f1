"""The graph that TensorRT gets, run in ONNX Runtime and held against transformers."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from bundles import own_bundle, shared_bundle

from doge_deploy.cli.main import run_command
from doge_deploy.errors import UsageError
from doge_deploy.targets.trt import lowering
from doge_deploy.verify.run import verify


@pytest.mark.parametrize(("model", "dtype"), [("doge-tiny", "fp16"), ("doge-tiny-moe", "bf16")])
def test_the_lowered_graphs_compute_what_transformers_computes(model: str, dtype: str) -> None:
    """Of a bundle whose cache can exceed the window of 64 keys, and so holds no more than that."""
    report = verify(shared_bundle(model, dtype=dtype), greedy_steps=8, lowering=True)
    assert report.failed_cases == []
    assert set(report.graphs) == {"static"}
    assert report.graphs["static"].startswith(
        "model.onnx lowered for TensorRT to a decode and a prefill graph (sha256 "
    )
    assert any(result.case == "window K=w+1" for result in report.results)


def test_a_graph_that_holds_the_text_is_one() -> None:
    report = verify(shared_bundle("doge-tiny", dtype="fp16", max_length=64), greedy_steps=8, lowering=True)
    assert report.failed_cases == []
    assert report.graphs["static"].startswith("model.onnx lowered for TensorRT (sha256 ")


def test_a_lowering_that_changes_a_number_is_found(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of one attention is off by one percent."""
    original = lowering.NativeAttentionPass.call

    def broken(self: lowering.NativeAttentionPass, model: ir.Model) -> ir.passes.PassResult:
        result = original(self, model)
        first = next(node for node in model.graph if node.op_type == "Attention")
        first.attributes["scale"] = ir.AttrFloat32("scale", first.attributes["scale"].as_float() * 1.01)
        return result

    monkeypatch.setattr(lowering.NativeAttentionPass, "call", broken)
    assert "static/prefill" in verify(tiny_bundle, greedy_steps=8, lowering=True).failed_cases


def test_only_the_static_layout_is_lowered(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="--lowering is of the static layout, not of growing"):
        verify(tiny_bundle, layouts=("growing",), lowering=True)


@pytest.mark.tensorrt
def test_the_report_names_the_engine_of_the_same_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = own_bundle(tmp_path / "tiny", "doge-tiny", dtype="fp16")
    assert run_command(["build", str(path)]) == 0
    assert run_command(["verify", str(path), "--lowering", "--greedy-steps", "4"]) == 0
    assert "that of trt-rtx-fp16-portable)" in " ".join(capfd.readouterr().out.split())
