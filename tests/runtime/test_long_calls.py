"""Calls of many tokens where a processor is slow with bytes: another graph on the same caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from bundles import make_bundle, shared_bundle
from random_doge import SMALL, save_random_doge

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.devices.host import multiplies_bytes
from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.ort import OrtRunner, open_runner, runners
from doge_deploy.runtime.ort import open as opening
from doge_deploy.verify.run import verify

WIDTHS = [24, 1, 5, 16, 1]
"""Calls of a text; those from `LONG_CALL` on are long here."""


@pytest.fixture(autouse=True)
def old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "multiplies_bytes", lambda: False)
    monkeypatch.setattr(runners, "LONG_CALL", 12)


@pytest.fixture(scope="module", params=["dense", "window"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "vocab_size": 256}
    window = {"keep_window_size": 64 if request.param == "dense" else 8}
    checkpoint = save_random_doge(path / "checkpoint", **{**SMALL, **sizes, **window})
    return open_bundle(make_bundle(checkpoint, path / "bundle", quantize="int8", logits="all"))


def replay(runner: OrtRunner) -> list[FloatArray]:
    ids = np.random.default_rng(0).integers(3, 256, (2, 64))
    runner.reset(2)
    logits, done = [], 0
    for width in WIDTHS:
        logits.append(runner.run(ids[:, done : done + width]).copy())
        done += width
    return logits


def error(found: list[FloatArray], expected: list[FloatArray]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True))


def test_a_long_call_does_not_round_the_state(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard graph is the reference: a text of long calls alone agrees with it as float32 does."""
    monkeypatch.setattr(runners, "LONG_CALL", 1)
    expected = replay(open_runner(bundle, portable=True, threads=1))
    runner = open_runner(bundle, threads=1)
    assert error(replay(runner), expected) <= 4e-6 * max(np.abs(one).max() for one in expected)
    monkeypatch.setattr(opening, "multiplies_bytes", lambda: True)
    rounded = error(replay(open_runner(bundle, threads=1)), expected)
    assert rounded > 1e-4, "what is compared is another graph"


def test_long_and_short_calls_share_the_caches(bundle: Bundle) -> None:
    """Each call continues the text of those before, of whichever graph they were."""
    expected = replay(open_runner(bundle, portable=True, threads=1))
    mixed = replay(open_runner(bundle, threads=1))
    assert error(mixed[:1], expected[:1]) <= 4e-6 * np.abs(expected[0]).max()
    assert error(mixed, expected) <= 0.1 * max(np.abs(one).max() for one in expected)


def test_a_graph_that_forgets_a_scale_is_seen(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "LONG_CALL", 1)
    expected = replay(open_runner(bundle, portable=True, threads=1))
    lowered = bundle.layout().lowered["ort"].long_calls
    assert lowered is not None
    model = ir.load(bundle.path / lowered)
    scaled = next(node for node in model.graph if (node.outputs[0].name or "").endswith(".scaled"))
    scaled.replace_input_with(1, scaled.inputs[0])
    file = tmp_path / "model.onnx"
    ir.save(model, file)
    original = opening.open_session

    def broken(graph: Path, **options: object) -> object:
        if graph.name != lowered:
            return original(graph, **options)  # type: ignore[arg-type]
        return original(file.read_bytes(), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "open_session", broken)
    assert error(replay(open_runner(bundle, threads=1)), expected) > 0.01


def test_the_session_is_opened_with_the_first_long_call(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[str] = []
    original = opening.open_session

    def recorded(graph: Path, **options: object) -> object:
        graphs.append(graph.name)
        return original(graph, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "open_session", recorded)
    runner = open_runner(bundle, threads=1)
    runner.reset(1)
    runner.run(np.array([[3, 4, 5]]))
    assert graphs == ["model.ort.onnx"]
    for _ in range(2):
        runner.run(np.full((1, 12), 7))
    assert graphs == ["model.ort.onnx", "model.ort.long.onnx"]
    kinds = [node.op_type for node in ir.load(bundle.path / graphs[1]).graph]
    assert "FusedMatMul" in kinds and "MatMulNBits" not in kinds


def test_quality_is_judged_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = shared_bundle("doge-tiny", quantize="int4")
    report = verify(bundle, greedy_steps=4)
    assert report.passed and report.graphs == {"static": "model.ort.onnx"}


def test_only_quantized_bundles_have_such_a_graph(tiny_bundle: Path) -> None:
    layouts = open_bundle(tiny_bundle).manifest.layouts
    assert all(layout.lowered["ort"].long_calls is None for layout in layouts.values())


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu sse2 avx2 fma", False),
        ("flags\t\t: fpu avx2 avx_vnni", True),
        ("flags\t\t: fpu avx512f avx512_vnni", True),
        ("flags\t\t: fpu avx512f", False),
        ("Features\t: fp asimd asimddp", True),
        ("Features\t: fp asimd", False),
        ("", True),
    ],
)
def test_processors(cpuinfo: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}\n")
    assert multiplies_bytes(tmp_path) is expected
