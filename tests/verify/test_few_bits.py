"""Formats whose engines round the inputs of products too: exact without that, judged with it, and damage is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from bundles import broken_copy, make_bundle, shared_bundle
from sweeps import cases

from doge_deploy.checkpoint.find import find_checkpoint
from doge_deploy.checkpoint.headers import read_header
from doge_deploy.cli.main import run_command
from doge_deploy.errors import UsageError
from doge_deploy.graph.rounded_inputs import mark_rounded, rounded_input
from doge_deploy.options.export import ExportOptions
from doge_deploy.pipelines import export as exporting
from doge_deploy.verify.report import Report
from doge_deploy.verify.run import verify

KINDS = {
    "fp8": ("doge-tiny", {"quantize": "fp8", "dtype": "fp16"}),
    "nvfp4": ("doge-tiny", {"quantize": "nvfp4", "dtype": "fp16"}),
    "int4-moe": ("doge-tiny-moe", {"quantize": "int4", "dtype": "fp16"}),
    "fp8-moe": ("doge-tiny-moe", {"quantize": "fp8", "dtype": "bf16"}),
    "nvfp4-moe": ("doge-tiny-moe", {"quantize": "nvfp4", "dtype": "bf16"}),
    "int4-bf16": ("doge-tiny", {"quantize": "int4", "dtype": "bf16"}),
}


def check(bundle: Path, *, lowering: bool = False) -> Report:
    return verify(bundle, greedy_steps=2, lowering=lowering)


@pytest.mark.parametrize(("model", "options"), cases(KINDS, ["fp8", "nvfp4"]))
def test_the_lowered_graph_is_exact_and_what_it_rounds_is_judged(model: str, options: dict[str, Any]) -> None:
    bundle = shared_bundle(model, **options, max_length=64)
    report = check(bundle, lowering=True)
    assert report.failed_cases == []
    if options["quantize"] == "int4":
        assert report.quality == []
        return
    (quality,) = report.quality
    assert quality.emulated and quality.mean_kl > 0.005
    (alone,) = check(bundle).quality
    assert alone.emulated and alone.mean_kl == quality.mean_kl, "with and without --lowering the same graph is judged"


def scaled(factor: float) -> Callable[[ir.Model], None]:
    """Marks with scales of inputs that are `factor` times what they were."""

    def change(model: ir.Model) -> None:
        for node in model.graph:
            found = rounded_input(node)
            if found is not None:
                mark_rounded(node, found.dtype, found.scale * factor)

    return change


def test_inputs_that_are_cut_off_lose_more_than_the_limit(tmp_path: Path) -> None:
    bundle = shared_bundle("doge-tiny", quantize="fp8", dtype="fp16", max_length=64)
    broken = broken_copy(bundle, tmp_path / "b", graph=scaled(1 / 16), portable=True)
    report = check(broken, lowering=True)
    assert report.failed_cases == ["static/quality"], "the graph is exact, and useless"


def test_halves_of_bytes_exchanged_are_found(tmp_path: Path) -> None:
    def exchange(path: Path) -> None:
        data = bytearray(path.read_bytes())
        for name, info in read_header(path).items():
            if name.endswith(".f4"):
                part = slice(info.offset, info.offset + info.nbytes)
                data[part] = bytes((byte >> 4) | (byte & 15) << 4 for byte in data[part])
        path.write_bytes(data)

    bundle = shared_bundle("doge-tiny", quantize="nvfp4", dtype="fp16", max_length=64)
    report = check(broken_copy(bundle, tmp_path / "b", weights=exchange))
    assert {"weights", "static/prefill", "static/quality"} <= set(report.failed_cases)
    assert report.quality[0].mean_kl > 1


def test_the_table_says_that_rounding_is_emulated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = shared_bundle("doge-tiny", quantize="fp8", dtype="fp16", max_length=64)
    report = tmp_path / "report.json"
    assert run_command(["verify", str(bundle), "--greedy-steps", "2", "--json", str(report)]) == 0
    assert "and rounded inputs of products as in an engine, emulated" in " ".join(capfd.readouterr().out.split())
    assert json.loads(report.read_text())["quality"][0]["emulated"] is True


def test_scales_of_inputs_come_from_the_text_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    texts: list[Any] = []
    original = exporting.encode
    monkeypatch.setattr(exporting, "encode", lambda checkpoint, text: texts.append(text) or original(checkpoint, text))
    text = tmp_path / "text.txt"
    text.write_text("A short text of our own.", encoding="utf-8")
    line = ["export", "doge-tiny", "--quantize", "fp8", "--dtype", "fp16", "--max-length", "64"]
    assert run_command([*line, "-o", str(tmp_path / "a"), "--calibration-text", str(text)]) == 0
    assert run_command([*line, "-o", str(tmp_path / "b")]) == 0
    assert texts == ["A short text of our own.", exporting.CALIBRATION]
    marks = [
        [rounded_input(node) for node in ir.load(tmp_path / name / "model.onnx").graph if node.op_type == "MatMul"]
        for name in ("a", "b")
    ]
    assert marks[0] != marks[1]
    capfd.readouterr()
    plain = ["export", "doge-tiny", "-o", str(tmp_path / "c"), "--calibration-text", str(text)]
    assert run_command(plain) == 2
    said = "only some weight formats are calibrated; give --quantize fp8 or nvfp4, or --quantize int4 with --dtype fp16"
    assert said in capfd.readouterr().err
    assert run_command([*plain, "--quantize", "int4"]) == 2
    assert said in capfd.readouterr().err
    text.write_bytes(b"\xff\xfe")
    assert run_command([*line, "-o", str(tmp_path / "d"), "--calibration-text", str(text)]) == 2
    assert "cannot be read as text" in capfd.readouterr().err
    text.write_text(" \n", encoding="utf-8")
    assert run_command([*line, "-o", str(tmp_path / "d"), "--calibration-text", str(text)]) == 2
    assert f"--calibration-text {text}: holds no text" in capfd.readouterr().err


def test_who_is_named_where_the_tokenizer_is_not_the_models(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(find_checkpoint("doge-tiny"), folder)
    line = ["export", str(folder), "-o", str(tmp_path / "b"), "--quantize", "fp8", "--dtype", "fp16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "encode", lambda checkpoint, text: [5, 2000])
        assert run_command(line) == 2
        (folder / "calibration.txt").write_text("A text.", encoding="utf-8")
        assert run_command(line) == 2
    reason = "the tokenizer makes token 2000 of it; tokens of this model are 0 to 1023"
    first, second = (text for text in capfd.readouterr().err.splitlines() if "error:" in text)
    assert first.endswith(f"error: text for calibration: {reason}")
    assert second.endswith(f"error: {folder / 'calibration.txt'}: {reason}")


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_engines_only_in_half_precision(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"quantize={kind} with dtype=fp32: .* fp16 or bf16; give dtype=fp16"):
        make_bundle("doge-tiny", tmp_path / "b", **ExportOptions(quantize=kind).model_dump(include={"quantize"}))
