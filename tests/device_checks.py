"""What runners on a GPU are held to: on one by `tests/runtime/**/test_*on_device.py`, and here on stand-ins.

Each check takes runners, so that the same lines run where no GPU is: on the stand-in engine and on the CPU provider
(`tests/runtime/test_device_checks.py`), which also shows that each can fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from doge_deploy.runtime.base import FloatArray, Runner

TOLERANCE = {"float16": 2**-6, "bfloat16": 2**-3, "float32": 1e-4}
"""Of the largest logit: 16 units in the last place; in float32 what other orders of sums make."""

STEPS = 16


@dataclass(frozen=True)
class EngineCase:
    """An engine to be built on the day, and what it is a case of."""

    model: str = "doge-tiny"
    quantize: str = ""
    dtype: str = "fp16"
    max_length: int = 0
    """0: the model's own, which exceeds the window, so that the cache is bounded."""
    capability: str = ""
    """The first compute capability that has it."""

    @property
    def export(self) -> dict[str, Any]:
        few = {"quantize": self.quantize} if self.quantize else {}
        length = {"max_length": self.max_length} if self.max_length else {}
        return {"dtype": self.dtype, **few, **length}

    @property
    def rounds_inputs(self) -> bool:
        """Whether it computes other numbers than the standard graph: then `verify` judges them, and nothing else."""
        return self.quantize in ("fp8", "nvfp4")


ENGINES = {
    "a-slot-for-each-token": EngineCase(max_length=64),
    "bounded": EngineCase(),
    "bounded-bf16": EngineCase(dtype="bf16"),
    "bounded-moe": EngineCase("doge-tiny-moe"),
    "int4": EngineCase(quantize="int4"),
    "int4-a-slot-for-each-token": EngineCase(quantize="int4", max_length=64),
    "int4-moe-bf16": EngineCase("doge-tiny-moe", quantize="int4", dtype="bf16"),
    "fp8": EngineCase(quantize="fp8", capability="8.9"),
    "nvfp4": EngineCase(quantize="nvfp4", capability="12.0"),
}
"""Of the bundled models: window 64, 512 tokens."""

BUILD = {"trt-rtx": (), "trt": ("--no-plugins",)}
"""Options of `build` by target: native layers in both."""

CUDA: dict[str, tuple[str, dict[str, Any]]] = {
    "dense-fp32": ("doge-tiny", {"max_length": 64}),
    "dense-fp16": ("doge-tiny", {"max_length": 64, "dtype": "fp16"}),
    "window-fp32": ("doge-tiny", {}),
    "window-fp16": ("doge-tiny", {"dtype": "fp16"}),
    "moe-fp32": ("doge-tiny-moe", {}),
    "moe-fp16": ("doge-tiny-moe", {"dtype": "fp16"}),
    "int4-fp32": ("doge-tiny", {"quantize": "int4"}),
    "int4-fp16": ("doge-tiny", {"quantize": "int4", "dtype": "fp16"}),
    "int8-fp32": ("doge-tiny", {"quantize": "int8"}),
}
"""Bundles for `--backend cuda`: model, options of the export."""


def follows(own: Runner, standard: Runner, dtype: str, *, tokens: int, rows: int = 2) -> None:
    """A prefill of two rows, one of them padded, then single tokens: the logits of the standard graph.

    No token comes twice in a row, so that no scores tie.

    Args:
        own: what is to be judged.
        standard: the standard graph in ONNX Runtime, with logits of the last token as `own` has them.
        dtype: a key of `TOLERANCE`.
        tokens: of the longer text before the steps.
        rows: of the call.
    """
    count = own.vocab_size // rows
    ids = np.random.default_rng(0).permutation(own.vocab_size)[: rows * count].reshape(rows, count)
    lengths = [tokens - 3 * row for row in range(rows)]
    found = []
    for runner in (own, standard):
        runner.reset(rows)
        first = runner.run(ids[:, :tokens], lengths)
        each = [np.stack([first[row, -1 if first.shape[1] == 1 else n - 1] for row, n in enumerate(lengths)])]
        for step in range(STEPS):
            each.append(runner.run(ids[:, tokens + step, None])[:, -1])
        found.append(np.stack(each).astype(np.float64))
    _close(found[0], found[1], dtype)


def _close(found: FloatArray, expected: FloatArray, dtype: str) -> None:
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert difference < TOLERANCE[dtype], f"logits differ by {difference:.2e} of the largest"


def rows_stay_apart(own: Any, dtype: str, *, tokens: int = 20) -> None:
    """A prefill of one row of two leaves the other alone, and a step of one row alone is that of both.

    Args:
        own: a runner that takes single rows of a cache.
        dtype: a key of `TOLERANCE`.
        tokens: of each text.
    """
    ids = np.random.default_rng(1).permutation(own.vocab_size)[: 4 * tokens].reshape(2, 2 * tokens)
    own.reset(2)
    own.run(ids[:, :tokens])
    before = {name: [row.copy() for row in rows] for name, rows in own.cache().items()}
    more = own.run_rows(1, ids[1:, tokens : tokens + 5], np.array([5])).numpy().copy()
    for name, rows in own.cache().items():
        np.testing.assert_array_equal(rows[0], before[name][0])
    own.reset(1)
    own.run(ids[1:, :tokens])
    alone = own.run(ids[1:, tokens : tokens + 5])
    _close(more[:, -1].astype(np.float64), alone[:, -1].astype(np.float64), dtype)


def holds_the_window(own: Any, standard: Any, dtype: str) -> None:
    """Far beyond the window as many tokens are held as it has slots, each once, nearly all of them the best by the
    standard graph's scores: in half precision some scores at the edge are equal within their rounding.

    Args:
        own: a runner whose cache holds the window.
        standard: the standard graph, which has the scores of all tokens.
        dtype: a key of `TOLERANCE`.
    """
    window = own.window
    ids = np.random.default_rng(2).permutation(own.vocab_size)[: 3 * window + STEPS]
    for runner in (own, standard):
        runner.reset(1)
        runner.run(ids[None, : 3 * window])
        for token in ids[3 * window :]:
            runner.run(np.array([[token]]))
    for layer, rows in own.held_positions().items():
        scores = standard.cache()[f"present.{layer}.score"][0][..., 0]
        for held, score in zip(rows[0], scores, strict=True):
            assert len(held) == len(set(held.tolist())) == window
            edge = np.sort(score)[::-1][window - 1]
            slack = TOLERANCE[dtype] * np.abs(score).max()
            assert score[held].min() >= edge - slack, f"layer {layer} holds a key that {window} others are better than"
