"""A whole model with its operators run as kernels, in the interpreter, against the bundle in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import shared_bundle
from kernel_cases import large
from random_doge import shared_doge

pytest.importorskip("triton", reason="kernels need Triton, which exists for Linux only")

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.cli.main import run_command
from doge_deploy.errors import UsageError
from doge_deploy.kernels import torch_ops
from doge_deploy.runtime.ort import open_runner
from doge_deploy.verify.run import verify
from doge_deploy.verify.torch_kernels import TorchKernelsRunner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CHUNKS = [7, 1, 1, 1, 12, 2]
"""Tokens of each call: below, at and above the window of 8, in both ways of the kernels."""


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_whole_model_by_kernels(model: str, dense_doge: Path, moe_doge: Path) -> None:
    source = dense_doge if model == "dense" else moe_doge
    bundle = open_bundle(shared_bundle(source, logits="all"))
    expected, found = open_runner(bundle), TorchKernelsRunner(bundle, open_checkpoint(str(source)))
    expected.reset(1)
    found.reset(1)
    ids = np.random.default_rng(0).permutation(np.arange(3, 64))
    start = 0
    for width in CHUNKS:
        chunk = ids[None, start : start + width]
        np.testing.assert_allclose(found.run(chunk), expected.run(chunk), rtol=0, atol=2e-5)
        start += width
    caches = expected.cache()
    for name, rows in found.cache().items():
        np.testing.assert_allclose(rows[0], caches[name][0], rtol=0, atol=2e-5)
    kinds = {name.split(".")[0] for name in found.extra}
    assert kinds == ({"kept"} if model == "dense" else {"kept", "experts"})
    assert found.extra["kept.1"].sum(-1).max() == bundle.manifest.facts.keep_window_size


def test_without_a_static_layout_it_is_said(dense_doge: Path) -> None:
    bundle = open_bundle(shared_bundle(dense_doge, kv_cache=("growing",)))
    with pytest.raises(UsageError, match="has no static layout"):
        TorchKernelsRunner(bundle, open_checkpoint(str(dense_doge)))


@pytest.fixture
def one_layer() -> Path:
    """A checkpoint that the interpreter is through with soon."""
    return shared_doge(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


@pytest.mark.parametrize(
    "model", ["one_layer", pytest.param("dense_doge", marks=pytest.mark.sweep), pytest.param("moe_doge", marks=large)]
)
def test_a_bundle_is_verified_by_kernels(model: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(model)
    bundle = shared_bundle(source, max_length=20)
    report = verify(bundle, reference=str(source), backend="torch-kernels", greedy_steps=4)
    assert report.failed_cases == []
    assert report.graphs == {"static": f"kernels on {DEVICE}, --backend torch-kernels"}
    selected = {result.case: result.selected for result in report.results}
    assert selected["window K=w+1"] and selected["window decode"] and selected["greedy"]


def test_a_wrong_kernel_is_found_out(one_layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that keeps one key fewer than the model."""

    def narrower(operator: Any, inputs: Any, attributes: dict[str, Any], **options: Any) -> Any:
        window = attributes.get("keep_window_size", 0)
        return run_operator(operator, inputs, {**attributes, "keep_window_size": window and window - 1}, **options)

    run_operator = torch_ops.run_operator
    monkeypatch.setattr(torch_ops, "run_operator", narrower)
    bundle = shared_bundle(one_layer, max_length=20)
    report = verify(bundle, reference=str(one_layer), backend="torch-kernels", greedy_steps=4)
    assert {"static/window K=w", "static/window decode"} <= set(report.failed_cases)
    assert "static/window K=w-1" not in report.failed_cases


@pytest.fixture
def small_bundle(dense_doge: Path) -> Path:
    return shared_bundle(dense_doge, quantize="int8")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["--portable"],
            2,
            "--portable belongs to --backend ort; torch-kernels does not take it",
        ),
        (["--layout", "growing"], 2, "--layout growing belongs to --backend ort; torch-kernels runs static"),
        (["--engine", "any"], 2, "--engine belongs to --backend trt or trt-rtx; torch-kernels does not take it"),
        (["--lowering"], 2, "--lowering judges a graph, and torch-kernels runs none that it is given"),
        ([], 3, "has quantized weights"),
    ],
    ids=["portable", "layout", "engine", "lowering", "quantized"],
)
def test_what_does_not_fit_is_one_line(
    options: list[str],
    code: int,
    message: str,
    small_bundle: Path,
    dense_doge: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["verify", str(small_bundle), "--reference", str(dense_doge), "--backend", "torch-kernels"]
    assert run_command([*arguments, *options]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a CUDA device")
def test_without_a_device_it_is_said(
    dense_doge: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    bundle = shared_bundle(dense_doge)
    assert run_command(["verify", str(bundle), "--reference", str(dense_doge), "--backend", "torch-kernels"]) == 4
    assert "kernels run on a CUDA device, not on 'cpu'; TRITON_INTERPRET=1" in capsys.readouterr().err
