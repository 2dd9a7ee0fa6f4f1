"""One layout of a bundle in ONNX Runtime, call by call.

Reference: https://onnxruntime.ai/docs/api/python/api_summary.html (I/O binding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.signature import PAST_ROPE, PRESENT_ROPE, SLOT_INDICES
from doge_deploy.dtypes import DTYPES
from doge_deploy.errors import UsageError
from doge_deploy.runtime.base import BundleRunner, FloatArray, IntArray
from doge_deploy.runtime.ort.prefill_chunks import joined_logits, joined_selections
from doge_deploy.runtime.padding import left_padded

if TYPE_CHECKING:
    import onnxruntime


PIECE = 512
"""Tokens of a call that are computed at once: attention holds `[H, Q, K]` numbers, and computes all K keys in use for
each token, those that it then hides too.
"""


class OrtRunner(BundleRunner):
    """What both layouts share: the session, its binding and the outputs beyond the signature."""

    def __init__(self, session: onnxruntime.InferenceSession, layout: Layout, *, max_length: int, last: bool) -> None:
        super().__init__(max_length=max_length, last_logits=last)
        self.session = session
        self.signature = layout.signature
        self.past = [(past.name, present.name) for past, present in layout.signature.past()]
        declared = {spec.name for spec in layout.signature.outputs}
        self.extra_outputs = [output.name for output in session.get_outputs() if output.name not in declared]
        self.extra: dict[str, np.ndarray[Any, Any]] = {}
        """Values of `extra_outputs` in the last call."""
        self._binding = session.io_binding()
        self._shapes = {spec.name: spec.shape for spec in (*layout.signature.inputs, *layout.signature.outputs)}
        values = (*session.get_inputs(), *session.get_outputs())
        self._dtypes = {value.name: _NUMPY_DTYPES.get(value.type) for value in values}

    def _zeros(self, name: str, **sizes: int) -> np.ndarray[Any, Any]:
        """A zeroed array for a graph value: finite everywhere, since a hidden key's 0 weight multiplies its value."""
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in self._shapes[name]]
        return np.zeros(shape, self._dtypes[name])

    def _reset_rope(self) -> None:
        """Forget the longest text so far, see `Signature.remembers_rope`."""
        names = (PAST_ROPE, PRESENT_ROPE) if self.signature.remembers_rope else ()
        self._rope_outputs = names[1:]
        self._rope = {name: self._zeros(name) for name in names}

    def _bind_rope(self) -> None:
        if self._rope:
            self._binding.bind_ortvalue_input(PAST_ROPE, _wrap(self._rope[PAST_ROPE]))
            self._binding.bind_ortvalue_output(PRESENT_ROPE, _wrap(self._rope[PRESENT_ROPE]))

    def _note_rope(self) -> None:
        """After a call: what it gave is what the next one gets."""
        if self._rope:
            self._rope[PAST_ROPE][:] = self._rope[PRESENT_ROPE]


class UncachedOrtRunner(OrtRunner):
    """A text in one call: `run` once after each `reset`. It returns last hidden states `[B, Q, hidden]` or class logits
    `[B, 1, labels]`.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, layout: Layout, max_length: int, pad_token_id: int | None
    ) -> None:
        self.output = layout.signature.outputs[0].name
        super().__init__(session, layout, max_length=max_length, last=self.output == "logits")
        self.pad_token_id = pad_token_id
        self._reset_rope()

    def _reset(self, batch_size: int) -> None:
        self._reset_rope()

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        if self.row_lengths.any():
            raise UsageError("this bundle has no cache: a text comes in one call, after `reset`")
        real = np.arange(input_ids.shape[1]) < lengths[:, None]
        padding = input_ids if self.pad_token_id is None else self.pad_token_id
        feeds = {
            "input_ids": np.where(real, input_ids, padding),
            "attention_mask": real.astype(np.int64),
            **({PAST_ROPE: self._rope[PAST_ROPE]} if self._rope else {}),
        }
        names = [self.output, *self._rope_outputs, *self.extra_outputs]
        outputs = dict(zip(names, self.session.run(names, feeds), strict=True))
        if self._rope:
            self._rope[PRESENT_ROPE] = outputs[PRESENT_ROPE]
            self._note_rope()
        self.extra = {name: outputs[name] for name in self.extra_outputs}
        result: FloatArray = outputs[self.output]
        return result[:, None] if self.last_logits else result

    def cache(self) -> dict[str, list[FloatArray]]:
        return {}


class StaticOrtRunner(OrtRunner):
    """Arrays that are bound once as inputs and outputs: the graph writes the caches, and the logits, in place.

    A decode step sets a few numbers in bound arrays and runs; what it does in Python does not grow with the number of
    layers or with the length of the text. Texts of as many rows follow each other in the same arrays: the first touch
    of fresh memory would take a twentieth of a prefill.

    Args:
        whole_calls: what a token gets depends on the call it is in, so calls are not cut into pieces of `PIECE` tokens.
    """

    def __init__(self, *arguments: Any, whole_calls: bool, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.whole_calls = whole_calls

    _batch: int | None = None
    """B of the caches; None where there are none yet."""
    _bound: tuple[int, int] | None = None
    """B and Q of the calls that the bound arrays are for."""
    _written: int = 0
    """Slots of the caches that may hold something, padding included."""

    def _reset(self, batch_size: int) -> None:
        if self._batch == batch_size:
            # What is left of another text would be hidden; but 0 times an infinite value is not 0.
            for buffer in self._buffers.values():
                buffer[:, :, : self._written] = 0
        else:
            self._binding.clear_binding_inputs()
            self._binding.clear_binding_outputs()
            self._bound = None
            self._batch = batch_size
            self._bind_buffers({present: self._zeros(past, batch_size=batch_size) for past, present in self.past})
        self._written = 0
        self._reset_rope()
        self._bind_rope()

    def _bind_buffers(self, buffers: dict[str, np.ndarray[Any, Any]]) -> None:
        """Take these arrays as caches; names are those of the present tensors."""
        self._buffers = buffers
        for past, present in self.past:
            value = _wrap(buffers[present])
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)

    def _bind(self, batch: int, width: int) -> None:
        """Bind arrays for calls of `width` tokens."""
        self._bound = batch, width
        self._inputs = {
            name: self._zeros(name, batch_size=batch, sequence_length=width)
            for name in ("input_ids", "write_indices", SLOT_INDICES, "sequence_lengths")
            if name in self._shapes
        }
        self._logits = self._zeros("logits", batch_size=batch, sequence_length=width)
        for name, array in self._inputs.items():
            self._binding.bind_ortvalue_input(name, _wrap(array))
        self._binding.bind_ortvalue_output("logits", _wrap(self._logits))

    @property
    def _piece(self) -> int:
        """Tokens that are computed at once."""
        return PIECE

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        width, step = input_ids.shape[1], self._piece
        if width <= step or self.whole_calls:
            return self._run_part(input_ids, lengths)
        parts, kept, before = [], [], self.row_lengths
        try:
            for start in range(0, width, step):
                part = input_ids[:, start : start + step]
                real = np.clip(lengths - start, 0, part.shape[1])
                parts.append(self._run_part(part, real))
                kept.append(self.extra)
                self.row_lengths = self.row_lengths + real
        finally:
            self.row_lengths = before  # the caller advances it
        self.extra = {name: joined_selections([part[name] for part in kept], len(lengths)) for name in kept[0]}
        return joined_logits(parts, lengths, step, last=self.last_logits)

    def _run_part(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        """A call, or a piece of one, in which rows that ended before have no real token."""
        if self._bound != input_ids.shape:
            self._bind(*input_ids.shape)
        self._inputs["input_ids"][:] = input_ids
        self._inputs["write_indices"][:] = self.row_lengths
        if SLOT_INDICES in self._inputs:
            self._inputs[SLOT_INDICES][:] = self.held()
        if "sequence_lengths" in self._inputs:
            np.maximum(lengths, 1, out=self._inputs["sequence_lengths"])
        self._written = max(self._written, int(self.held().max()) + input_ids.shape[1])
        for name in self.extra_outputs:  # their shapes change from call to call
            self._binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(self._binding)
        self._note_rope()
        if self.extra_outputs:
            names = [*(present for _, present in self.past), *self._rope_outputs, "logits", *self.extra_outputs]
            outputs = dict(zip(names, self._binding.get_outputs(), strict=True))
            self.extra = {name: outputs[name].numpy() for name in self.extra_outputs}
        logits: FloatArray = self._logits.copy()
        return logits

    def held(self) -> IntArray:
        """Slots in use of each row, `[B]`."""
        return self.row_lengths

    def cache(self) -> dict[str, list[FloatArray]]:
        return {
            name: [rows[b, :, :n].copy() for b, n in enumerate(self.held())] for name, rows in self._buffers.items()
        }


def _wrap(array: np.ndarray[Any, Any]) -> Any:
    """An OrtValue on the array's own memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


class GrowingOrtRunner(OrtRunner):
    """Present tensors of one call are the past of the next; they never leave ONNX Runtime's memory.

    Rows of different length are padded on the left, the convention of Hugging Face tools; the padding stays in the
    cache as holes that `attention_mask` hides.
    """

    def _reset(self, batch_size: int) -> None:
        self._reset_rope()
        empty = {"batch_size": batch_size, "past_sequence_length": 0}
        self._values = {present: _wrap(self._zeros(past, **empty)) for past, present in self.past}
        self.real = np.zeros((batch_size, 0), bool)

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        left = left_padded(input_ids, lengths)
        self.real = np.concatenate((self.real, left.real), axis=1)
        positions = np.maximum(self.row_lengths[:, None] + left.source, 0)
        logits = self.run_masked(left.input_ids, self.real.astype(np.int64), positions)
        return logits if self.last_logits else left.restore(logits)

    def real_columns(self) -> npt.NDArray[np.bool_]:
        return self.real

    def run_masked(self, input_ids: IntArray, attention_mask: IntArray, position_ids: IntArray) -> FloatArray:
        """One call with the caller's own mask `[B, P+Q]` and positions `[B, Q]`: the convention of Hugging Face
        tools.
        """
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for past, present in self.past:
            self._binding.bind_ortvalue_input(past, self._values[present])
            self._binding.bind_output(present, "cpu")
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids))
        self._binding.bind_cpu_input("attention_mask", np.ascontiguousarray(attention_mask))
        self._binding.bind_cpu_input("position_ids", np.ascontiguousarray(position_ids))
        self._bind_rope()
        for name in ("logits", *self.extra_outputs):
            self._binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(self._binding)
        self._note_rope()
        names = [*(present for _, present in self.past), *self._rope_outputs, "logits", *self.extra_outputs]
        outputs = dict(zip(names, self._binding.get_outputs(), strict=True))
        self._values = {present: outputs[present] for _, present in self.past}
        self.extra = {name: outputs[name].numpy() for name in self.extra_outputs}
        logits: FloatArray = outputs["logits"].numpy()
        return logits

    def cache(self) -> dict[str, list[FloatArray]]:
        return {
            name: [rows[b][:, real[len(real) - rows.shape[2] :]] for b, real in enumerate(self.real)]
            for name, rows in ((name, value.numpy()) for name, value in self._values.items())
        }


_NUMPY_DTYPES = {f"tensor({DTYPES[name].onnx.lower()})": np.dtype(name) for name in ("float32", "float16", "int64")}
"""By ONNX Runtime's name; those of a graph's inputs and outputs."""
