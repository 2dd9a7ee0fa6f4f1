"""The runner of the CUDA provider, with the device `cpu`: the same code, in the processor's memory.

What servers do with rows is in tests/runtime/test_slots.py, where it is one backend among others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import shared_bundle
from random_doge import DYNAMIC, SMALL, shared_doge

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import MissingDependencyError
from doge_deploy.runtime import cuda
from doge_deploy.runtime.base import IntArray, Runner
from doge_deploy.runtime.cuda import open as opening
from doge_deploy.runtime.cuda import runner as running
from doge_deploy.runtime.cuda.memory import DeviceArray, DeviceMemory
from doge_deploy.runtime.cuda.runner import CudaRunner
from doge_deploy.runtime.logits import NO_TOKEN
from doge_deploy.runtime.ort import open_runner

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window": ({}, {}),
    "all-logits": ({"keep_window_size": 64}, {"logits": "all", "dtype": "fp16"}),
    "dynamic": (
        {"head_dim": 16, "max_position_embeddings": 16, "rope_parameters": DYNAMIC},
        {"max_length": 64},
    ),
}


def bundle_of(config: str) -> Path:
    changes, options = CONFIGS[config]
    return shared_bundle(shared_doge(**{**SMALL, **changes}), **options)


def runners(config: str) -> tuple[CudaRunner, Runner]:
    bundle = open_bundle(bundle_of(config))
    return cuda.open_runner(bundle, bundle.layout(), device="cpu"), open_runner(bundle, portable=True, threads=1)


def calls() -> list[tuple[IntArray, list[int]]]:
    """A batch with padding, steps, chunks, and a step again."""
    rng = np.random.default_rng(3)
    shapes = ((9, [9, 4, 1]), (1, [1, 1, 1]), (13, [13, 2, 7]), (1, [1, 1, 1]), (6, [1, 6, 6]))
    return [(rng.integers(3, SMALL["vocab_size"], (3, width)), lengths) for width, lengths in shapes]


def furthest(own: Runner, other: Runner, *, rows: int = 3) -> float:
    """The largest difference of logits over the calls, and of what the caches hold after them."""
    for runner in (own, other):
        runner.reset(rows)
    most = 0.0
    for ids, lengths in calls():
        one, two = (runner.run(ids, lengths).astype(np.float64) for runner in (own, other))
        if one.shape[1] > 1:  # logits of padding are anybody's
            real = np.arange(one.shape[1]) < np.array(lengths)[:, None]
            one, two = one[real], two[real]
        most = max(most, float(np.abs(one - two).max()))
    held, expected = own.cache(), other.cache()
    assert held.keys() == expected.keys()
    for name, texts in held.items():
        for text, right in zip(texts, expected[name], strict=True):
            assert text.shape == right.shape
            most = max(most, float(np.abs(text.astype(np.float64) - right).max()))
    return most


@pytest.mark.parametrize("config", CONFIGS)
def test_it_computes_what_the_standard_graph_does(config: str) -> None:
    assert furthest(*runners(config)) == 0


@pytest.mark.parametrize("config", ["window", "all-logits"])
def test_a_long_call_in_pieces_is_the_call(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "CHUNK", 4)
    assert furthest(*runners(config)) <= (1e-5 if config == "window" else 2e-2)


def test_an_emptied_row_is_as_good_as_new() -> None:
    own, other = runners("window")
    assert furthest(own, other) == 0
    assert furthest(own, other) == 0, "the second text is in the same buffers"


def test_what_is_left_of_another_text_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = runners("window")
    own.reset(2)
    own.run(np.full((2, 9), 5))
    past = next(iter(own.caches))
    assert own.caches[past].read()[:, :, :9].any()
    own.reset(2)
    assert not any(cache.read().any() for cache in own.caches.values())
    own.run(np.full((2, 9), 5))
    monkeypatch.setattr(DeviceMemory, "copy", lambda *arguments: None)
    own.reset(2)
    assert own.caches[past].read()[:, :, :9].any()


def test_a_cache_that_is_not_written_in_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(self: Any, runner: CudaRunner, first: int, rows: int, width: int) -> None:
        made(self, runner, first, rows, width)
        past, present = runner.past[0]
        shape = (rows, *runner.caches[past].shape[1:])
        self.stray = DeviceArray(runner.memory, shape, runner.caches[past].dtype)
        self.binding.bind_ortvalue_output(present, self.stray.value)

    made = running._Call.__init__
    monkeypatch.setattr(running._Call, "__init__", elsewhere)
    assert furthest(*runners("window")) > 1e-3


def test_rows_of_a_call_are_found_by_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows alone are a part of the same buffers; with the address of the first row they would be other ones."""
    own, _ = runners("window")

    def second_row(runner: CudaRunner) -> Any:
        runner.reset(3)
        for row, token in enumerate((5, 6, 7)):
            runner.run_rows(row, np.full((1, 4), token), np.array([4]))
        return runner.run_rows(1, np.array([[8], [9]]), np.array([1, 1])).numpy()

    right = second_row(own)
    monkeypatch.setattr(running, "_row_bytes", lambda cache: 0 if cache.shape[0] == 3 else 1)
    wrong, _ = runners("window")
    assert not np.array_equal(second_row(wrong), right)


def test_the_likeliest_token_needs_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = runners("window")
    own.reset(2)
    logits = own.run_rows(0, np.array([[5, 6], [7, 8]]), np.array([2, 1]))
    expected = logits.numpy().argmax(axis=-1)
    read: list[str] = []
    arrays = {id(array): name for name, array in own._call.outputs.items()}  # type: ignore[union-attr]
    plain = DeviceArray.read
    monkeypatch.setattr(DeviceArray, "read", lambda self: (read.append(arrays[id(self)]), plain(self))[1])
    fresh = own.run_rows(0, np.array([[5, 6], [7, 8]]), np.array([2, 1])).argmax()
    assert fresh.shape == expected.shape and "logits" not in read


def test_the_likeliest_token_is_that_of_the_interface() -> None:
    """The lowest of equals; none where a logit is not a number or the largest is infinite."""
    import onnx_ir as ir
    import onnxruntime

    from doge_deploy.runtime.logits import best_tokens
    from doge_deploy.targets.cuda.best_tokens import BestTokensPass

    for dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        x, y = (ir.Value(name=name, shape=ir.Shape(["b", 1, 5]), type=ir.TensorType(dtype)) for name in ("x", "logits"))
        node = ir.Node("", "Identity", [x], outputs=[y])
        model = ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 24}), ir_version=11)
        data = ir.to_proto(BestTokensPass()(model).model).SerializeToString()
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        infinity, nan = np.inf, np.nan
        rows = [
            [1, 3, 3, 2, 3],
            [-infinity, -2, -1, -1, -infinity],
            [1, nan, 5, 6, 7],
            [1, 2, infinity, 3, 4],
            [-infinity] * 5,
        ]
        logits = np.array(rows, dtype.numpy())[:, None]
        given, tokens, best = session.run(None, {"x": logits})
        assert np.array_equal(given, logits, equal_nan=True)
        found = np.where(np.isfinite(best), tokens, NO_TOKEN)
        assert found.tolist() == best_tokens(logits).tolist() == [[1], [2], [NO_TOKEN], [NO_TOKEN], [NO_TOKEN]]


def test_logits_of_an_earlier_call_are_not_given_out() -> None:
    own, _ = runners("window")
    own.reset(1)
    logits = own.run_rows(0, np.array([[5, 6]]), np.array([2]))
    own.run_rows(0, np.array([[7]]), np.array([1]))
    for ask in (logits.numpy, logits.argmax):
        with pytest.raises(RuntimeError, match="overwritten by a later call"):
            ask()


class TestWithoutADevice:
    """One line and exit code 4, whatever is asked."""

    @pytest.mark.parametrize("command", ["generate", "verify", "serve"])
    def test_here(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        more = ["--prompt", "A list"] if command == "generate" else []
        assert run_command([command, str(shared_bundle("doge-tiny")), "--backend", "cuda", *more]) == 4
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and "has no CUDA provider" in captured.err
        assert "pip install 'doge-deploy[gpu]'" in captured.err

    def test_both_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(opening, "_is_installed", lambda package: True)
        with pytest.raises(MissingDependencyError, match="because onnxruntime is installed over onnxruntime-gpu: on a"):
            opening._import("cuda")

    def test_an_older_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [opening.PROVIDER])
        monkeypatch.setattr(onnxruntime, "__version__", "1.30.2")
        with pytest.raises(
            MissingDependencyError, match=r"onnxruntime-gpu 1\.30\.2 is older than 1\.31: pip uninstall"
        ):
            opening._import("cuda")

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [opening.PROVIDER])
        bundle = open_bundle(bundle_of("window"))
        with pytest.raises(MissingDependencyError, match="finds no NVIDIA GPU that it can use"):
            cuda.open_runner(bundle, bundle.layout())
