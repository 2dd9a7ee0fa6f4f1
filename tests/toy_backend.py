"""A backend in one file: the growing graph in ONNX's reference evaluator, which is NumPy operator by operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.runtime.base import BundleRunner, FloatArray, IntArray
from doge_deploy.runtime.padding import left_padded
from doge_deploy.targets.backend import Backend, Library, SessionOptions


class ToyRunner(BundleRunner):
    """Present tensors of one call are the past of the next."""

    def __init__(self, bundle: Bundle, layout: Layout, model: onnx.ModelProto) -> None:
        manifest = bundle.manifest
        super().__init__(max_length=manifest.max_length, last_logits=manifest.last_logits)
        self.signature = layout.signature
        self.extra: dict[str, npt.NDArray[Any]] = {}
        load_external_data_for_model(model, str(bundle.path))
        self._evaluator = ReferenceEvaluator(model)

    def _reset(self, batch_size: int) -> None:
        self._real = np.zeros((batch_size, 0), bool)
        sizes = {"batch_size": batch_size, "past_sequence_length": 0}
        self._past: dict[str, FloatArray] = {}
        for past, _ in self.signature.past():
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in past.shape]
            self._past[past.name] = np.zeros(shape, past.dtype)

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        left = left_padded(input_ids, lengths)
        self._real = np.concatenate((self._real, left.real), axis=1)
        feeds = {
            "input_ids": left.input_ids,
            "attention_mask": self._real.astype(np.int64),
            "position_ids": np.maximum(self.row_lengths[:, None] + left.source, 0),
            **self._past,
        }
        found = dict(zip(self._evaluator.output_names, self._evaluator.run(None, feeds), strict=True))
        logits: FloatArray = found.pop("logits")
        self._past = {past.name: found.pop(present.name) for past, present in self.signature.past()}
        self.extra = found
        return logits if self.last_logits else left.restore(logits)

    def real_columns(self) -> npt.NDArray[np.bool_]:
        return self._real

    def cache(self) -> dict[str, list[FloatArray]]:
        held = {present.name: self._past[past.name] for past, present in self.signature.past()}
        return {name: [rows[b][:, real] for b, real in enumerate(self._real)] for name, rows in held.items()}


class Toy(Backend[ToyRunner]):
    """For tests; it takes no options and runs what a few seconds of NumPy can."""

    name = "toy"
    title = "the reference evaluator"
    libraries = (Library("onnx", "graph"),)
    layouts = ("growing",)
    runs_graphs = True
    shows_selections = True

    def open(self, bundle: Bundle, layout: Layout, options: SessionOptions, *, graph: bytes | None = None) -> ToyRunner:
        data = (bundle.path / layout.file).read_bytes() if graph is None else graph
        return ToyRunner(bundle, layout, onnx.load_model_from_string(data))

    def obstacle(self, runner: ToyRunner, calls: Any) -> str | None:
        """Nobody waits for more."""
        return "more than 60 calls" if len(calls) > 60 else None


BACKEND = Toy()
