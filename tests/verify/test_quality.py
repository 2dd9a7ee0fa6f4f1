"""Quantized bundles: exact against dequantized weights, judged for what the rounding costs, and damage is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from bundles import broken_copy, edit_bytes, make_bundle, shared_bundle
from random_doge import SMALL, save_random_doge
from safetensors import safe_open

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.runtime.ort import open_runner
from doge_deploy.verify.report import Report
from doge_deploy.verify.run import verify


@pytest.fixture
def quantized() -> Callable[[str], Path]:
    """doge-tiny with a window that its length cannot exceed, in the given kind of weights; do not write into it."""
    return lambda kind: shared_bundle("doge-tiny", max_length=64, quantize=kind)


def check(bundle: Path) -> Report:
    return verify(bundle, greedy_steps=4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_good_bundle_passes_and_is_small(kind: str, quantized: Callable[[str], Path]) -> None:
    report = check(quantized(kind))
    assert report.passed, (report.failed_cases, report.quality)
    (quality,) = report.quality
    assert 0 < quality.mean_kl < {"int8": 0.01, "int4": 0.3}[kind]
    assert report.graphs == {"static": "model.ort.onnx"}
    with safe_open(quantized(kind) / "weights.safetensors", framework="np") as file:
        names = set(file.keys())
    assert f"model.embed_tokens.weight.q{kind[-1]}" in names
    assert "model.embed_tokens.weight" not in names
    assert "model.layers.0.self_attn.dt_proj.weight.T" in names


@pytest.mark.parametrize("name", ["doge-tiny", "doge-tiny-moe"])
def test_weights_in_half_precision(name: str) -> None:
    bundle = shared_bundle(name, quantize="fp16", max_length=64)
    report = check(bundle)
    assert report.passed, (report.failed_cases, report.quality)
    assert report.graphs == {"static": "model.ort.onnx"}
    (quality,) = report.quality
    assert 0 < quality.mean_kl < 0.002
    with safe_open(bundle / "weights.safetensors", framework="np") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert dtypes["model.embed_tokens.weight"] == "F16"
    assert dtypes["model.layers.0.self_attn.dt_proj.weight.T"] == "F32"
    assert dtypes["model.norm.weight"] == "F32"
    kinds = [node.op_type for node in ir.load(bundle / "model.ort.onnx").graph]
    assert "GroupQueryAttention" in kinds and "FusedMatMul" in kinds, "the passes know such weights"


def test_half_weights_one_projection_off_by_ten_percent(tmp_path: Path) -> None:
    bundle = shared_bundle("doge-tiny", quantize="fp16", max_length=64)
    report = check(broken_copy(bundle, tmp_path / "broken", graph=partial(scale_one_projection, operator="MatMul")))
    assert {"static/quality", "static/prefill"} <= set(report.failed_cases)
    assert report.quality[0].mean_kl > 0.002


def test_a_half_weight_off_by_an_ulp_is_found(tmp_path: Path) -> None:
    bundle = shared_bundle("doge-tiny", quantize="fp16", max_length=64)
    tensor = "model.layers.0.mlp.down_proj.weight.T"

    def up(data: np.ndarray) -> np.ndarray:
        data.view(np.uint16)[7] += 1
        return data

    broken = broken_copy(bundle, tmp_path / "broken", weights=lambda path: edit_bytes(path, tensor, up))
    assert "weights" in check(broken).failed_cases


def test_asymmetric_blocks_and_experts(tmp_path: Path) -> None:
    options = {"quantize": "int8", "block_size": 16, "symmetric": False, "max_length": 48}
    report = check(make_bundle("doge-tiny-moe", tmp_path / "b", **options))
    assert report.passed, (report.failed_cases, report.quality)


def scale_one_projection(model: ir.Model, operator: str = "MatMulNBits") -> None:
    """As if the scales of one projection were 10 % too large."""
    node = [node for node in model.graph if node.op_type == operator][3]
    factor = ir.node("Constant", [], {"value_float": 1.1})
    scaled = ir.node("Mul", [node.outputs[0], factor.outputs[0]])
    node.outputs[0].replace_all_uses_with(scaled.outputs[0])
    scaled.replace_input_with(0, node.outputs[0])
    model.graph.insert_after(node, [factor, scaled])


def test_one_projection_off_by_ten_percent(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    report = check(broken_copy(quantized("int8"), tmp_path / "b", graph=scale_one_projection))
    assert report.failed_cases == ["static/quality"]
    assert report.quality[0].mean_kl > 0.01


DAMAGE: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "halves-of-bytes-exchanged": ("model.embed_tokens.weight.q4", lambda b: (b >> 4) | (b << 4)),
    "wrong-zero-point": ("zero_point.1024x4", lambda b: b - 0x11),
}


@pytest.mark.parametrize(("tensor", "edit"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_weights(
    tensor: str, edit: Callable[[np.ndarray], np.ndarray], quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = broken_copy(quantized("int4"), tmp_path / "b", weights=lambda path: edit_bytes(path, tensor, edit))
    report = check(broken)
    assert "weights" in report.failed_cases
    assert "static/prefill" in report.failed_cases


def test_halves_exchanged_lose_more_than_a_nat(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    tensor, edit = DAMAGE["halves-of-bytes-exchanged"]
    broken = broken_copy(quantized("int4"), tmp_path / "b", weights=lambda path: edit_bytes(path, tensor, edit))
    report = check(broken)
    assert report.quality[0].mean_kl > 1
    assert "static/quality" in report.failed_cases


def test_quality_is_in_the_reports(
    quantized: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--junit", str(tmp_path / "r.xml")]
    assert run_command(["verify", str(quantized("int4")), "--greedy-steps", "2", *files]) == 0
    assert "tokens of held-out text: KL" in capfd.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["quality"][0]["passed"] is True
    assert report["quality_limits"]["int4"]["reason"]
    assert 'name="quality"' in (tmp_path / "r.xml").read_text()


@pytest.mark.parametrize(
    ("options", "block", "sizes"),
    [
        ({"quantize": "int8"}, 128, {"q_proj": 128, "o_proj": 64, "down_proj": 16}),
        pytest.param({"quantize": "int4"}, 32, {"q_proj": 32, "o_proj": 32, "down_proj": 16}, marks=pytest.mark.sweep),
        ({"quantize": "int4", "symmetric": False}, 32, {"q_proj": 32, "o_proj": 32, "down_proj": 16}),
        pytest.param(
            {"quantize": "int8", "block_size": 256},
            256,
            {"q_proj": 128, "o_proj": 64, "down_proj": 16},
            marks=pytest.mark.sweep,
        ),
    ],
    ids=str,
)
def test_blocks_that_suit_each_weight(
    options: dict[str, Any], block: int, sizes: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = save_random_doge(tmp_path / "checkpoint", **{**SMALL, "hidden_size": 128, "head_dim": 16})
    bundle = make_bundle(checkpoint, tmp_path / "b", **options)
    opened = open_bundle(bundle)
    assert opened.manifest.options.block_size == block
    left = [note for note in opened.layout().notes if "is not quantized" in note]
    assert len(left) == 1 and ".dt_proj." in left[0]
    names = {name: f"mlp.{name}" if name == "down_proj" else f"self_attn.{name}" for name in sizes}
    rows = {"q_proj": 128, "o_proj": 64, "down_proj": 48}
    with safe_open(bundle / "weights.safetensors", framework="np") as file:
        scales = {name: file.get_tensor(f"model.layers.0.{names[name]}.weight.scale") for name in sizes}
    assert {name: rows[name] // scale.shape[1] for name, scale in scales.items()} == sizes
    report = verify(bundle, reference=str(checkpoint), greedy_steps=2, portable=True)
    assert not [(result.case, result.failures) for result in report.results if not result.passed]
    portable, served = (logits_of(bundle, portable=portable) for portable in (True, False))
    assert np.abs(served - portable).max() < 0.05 * np.abs(portable).max(), "the state is rounded to 8 bits"


def logits_of(bundle: Path, *, portable: bool) -> np.ndarray[Any, Any]:
    """Of a short text."""
    runner = open_runner(open_bundle(bundle), portable=portable)
    runner.reset()
    return runner.run(np.arange(3, 11)[None])


def test_bytes_need_fp32(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "doge-tiny", "-o", str(tmp_path / "b"), "--quantize", "int8", "--dtype", "fp16"]
    assert run_command(arguments) == 2
    assert "int8 weights are computed with in fp32; give dtype=fp32" in capfd.readouterr().err
