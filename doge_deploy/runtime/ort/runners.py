"""One layout of a bundle in ONNX Runtime, call by call.

Reference: https://onnxruntime.ai/docs/api/python/api_summary.html (I/O binding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.signature import LOGIT_OFFSETS, PAST_ROPE, PRESENT_ROPE, SLOT_INDICES
from doge_deploy.dtypes import DTYPES
from doge_deploy.errors import UsageError
from doge_deploy.runtime.base import BundleRunner, FloatArray, IntArray
from doge_deploy.runtime.logits import HostLogits, Logits
from doge_deploy.runtime.padding import left_padded
from doge_deploy.runtime.rows import ChangingAngles, RowsRunner, row_range

if TYPE_CHECKING:
    import onnxruntime


PIECE = 512
"""Tokens of a call that are computed at once: attention holds `[H, Q, K]` numbers, and computes all K keys in use for
each token, those that it then hides too.
"""

LONG_CALL = 128
"""Tokens of a call, of all rows together, from which it pays to unpack weights of 8 bits."""


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

    def _forget_rope(self) -> None:
        for value in self._rope.values():
            value[:] = 0

    def _bind_rope(self, binding: Any) -> None:
        if self._rope:
            binding.bind_ortvalue_input(PAST_ROPE, wrap(self._rope[PAST_ROPE]))
            binding.bind_ortvalue_output(PRESENT_ROPE, wrap(self._rope[PRESENT_ROPE]))

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


class _Calls:
    """The binding of the calls of some rows, with the arrays that are filled anew in each of them."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.binding: Any = session.io_binding()
        self.shape = (0, 0)
        """Q of the calls that the arrays are for, and how many tokens of a row have logits; zeros where there are none
        yet."""
        self.inputs: dict[str, np.ndarray[Any, Any]] = {}
        self.logits: FloatArray = np.zeros(0)
        self.memory: np.ndarray[Any, Any] | None = None
        """What `logits` is a view of."""


class StaticOrtRunner(OrtRunner, RowsRunner):
    """Arrays that are bound once as inputs and outputs: the graph writes the caches, and the logits, in place.

    A decode step sets a few numbers in bound arrays and runs; what it does in Python does not grow with the number of
    layers or with the length of the text. Some rows alone are a contiguous part of the same arrays, bound as such.
    Texts of as many rows follow each other in the same arrays: the first touch of fresh memory would take a twentieth
    of a prefill.

    Args:
        whole_calls: what a token gets depends on the call it is in, so calls are not cut into pieces of `PIECE` tokens.
        angles: see `RowsRunner`.
        long_session: opens a session of another graph of the same inputs and outputs, for calls of `LONG_CALL` tokens
            and more; it is opened with the first of them. None where all calls are of one session.
    """

    def __init__(
        self,
        *arguments: Any,
        whole_calls: bool,
        angles: ChangingAngles | None = None,
        long_session: Callable[[], onnxruntime.InferenceSession] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self._open_long = long_session
        self._long_session: onnxruntime.InferenceSession | None = None
        self.whole_calls = whole_calls
        optional = {value.name for value in self.session.get_overridable_initializers()}
        self.many_logits = LOGIT_OFFSETS in optional
        self.angles = angles
        self.vocab_size = int(self._shapes["logits"][-1])

    _batch: int | None = None
    """B of the caches; None where there are none yet."""
    _count: int = 0
    """Runs of the session: each overwrites the logits of the one before."""

    def _reset(self, batch_size: int) -> None:
        if self._batch == batch_size:
            # What is left of another text would be hidden; but 0 times an infinite value is not 0.
            for row in range(batch_size):
                self._clear_row(row, 0)
        else:
            self._batch = batch_size
            self._written: IntArray = np.zeros(batch_size, np.int64)
            """Slots of each row that may hold something, padding included."""
            self._memory = self._zeros("logits", batch_size=batch_size, sequence_length=1).ravel()
            self._reset_rope()
            self._bind_buffers({present: self._zeros(past, batch_size=batch_size) for past, present in self.past})

    def _bind_buffers(self, buffers: dict[str, np.ndarray[Any, Any]]) -> None:
        """Take these arrays as caches; names are those of the present tensors."""
        self._buffers = buffers
        self._calls: dict[tuple[int, int, bool], _Calls] = {}

    def _calls_for(self, first: int, rows: int, width: int, last: int) -> _Calls:
        """What is bound for calls of some rows and of `width` tokens, of which `last` have logits."""
        shape = (rows, last if self.last_logits else width, self.vocab_size)
        if self._memory.size < math.prod(shape):  # logits of all calls share it
            self._memory = np.zeros(math.prod(shape), self._memory.dtype)
            self._calls.clear()  # what is bound to smaller memory would keep it
        is_long = self._open_long is not None and rows * width >= LONG_CALL
        calls = self._calls.get((first, rows, is_long))
        if calls is None:
            calls = self._calls[first, rows, is_long] = _Calls(self._session_for(is_long))
            for past, present in self.past:
                value = wrap(self._buffers[present][row_range(first, rows)])
                calls.binding.bind_ortvalue_input(past, value)
                calls.binding.bind_ortvalue_output(present, value)
            self._bind_rope(calls.binding)
        if calls.shape != (width, last):
            calls.shape = width, last
            calls.inputs = {
                name: self._zeros(name, batch_size=rows, sequence_length=width)
                for name in ("input_ids", "write_indices", SLOT_INDICES, "sequence_lengths")
                if name in self._shapes
            }
            if self.many_logits:
                calls.inputs[LOGIT_OFFSETS] = np.arange(last)[::-1].copy()
            for name, array in calls.inputs.items():
                calls.binding.bind_ortvalue_input(name, wrap(array))
            calls.memory = None
        if calls.memory is not self._memory:
            calls.memory, calls.logits = self._memory, self._memory[: math.prod(shape)].reshape(shape)
            calls.binding.bind_ortvalue_output("logits", wrap(calls.logits))
        return calls

    def take_memory(self) -> None:
        """Writes zeros where nothing was ever written: arrays of zeros have no memory before that."""
        for row, written in enumerate(self._written.tolist()):
            for buffer in self._buffers.values():
                buffer[row, :, written:] = 0

    def joins(self, lengths: Sequence[int]) -> bool:
        """Not where some of the rows alone would be a call of the other session, which rounds in another way."""
        is_long = len(lengths) * max(lengths) >= LONG_CALL
        other = self._open_long is not None and is_long and min(lengths) < LONG_CALL
        return super().joins(lengths) and not other

    def _session_for(self, is_long: bool) -> onnxruntime.InferenceSession:
        if not is_long:
            return self.session
        if self._long_session is None:
            assert self._open_long is not None
            self._long_session = self._open_long()
        return self._long_session

    @property
    def _piece(self) -> int:
        """Tokens that are computed at once."""
        return PIECE

    def _run_rows(self, first: int, input_ids: IntArray, lengths: IntArray) -> Logits:
        width, step = input_ids.shape[1], self._piece
        if width <= step or self.whole_calls:
            logits, number = self._run_part(first, input_ids, lengths), self._count
            return HostLogits(logits, lambda: self._count == number)
        return self._run_in_pieces(first, input_ids, lengths, step, lambda *part: self._run_part(*part).copy())

    def _run_last(self, first: int, input_ids: IntArray, last: int) -> Logits:
        rows, width = input_ids.shape
        lengths, step = np.full(rows, width), self._piece
        if width <= step or self.whole_calls:
            logits, number = self._run_part(first, input_ids, lengths, last), self._count
            return HostLogits(logits, lambda: self._count == number)

        def run(first: int, part: IntArray, real: IntArray) -> FloatArray:
            return self._run_part(first, part, real, part.shape[1]).copy()

        found = self._run_in_pieces(first, input_ids, lengths, step, run, every=True)
        return HostLogits(found.numpy()[:, -last:])

    def _run_part(self, first: int, input_ids: IntArray, lengths: IntArray, last: int = 1) -> FloatArray:
        """A call, or a piece of one, in which rows that ended before have no real token.

        Returns logits that the next call overwrites.
        """
        count, width = input_ids.shape
        rows = row_range(first, count)
        calls = self._calls_for(first, count, width, last)
        held = self.held()[rows]
        calls.inputs["input_ids"][:] = input_ids
        calls.inputs["write_indices"][:] = self.row_lengths[rows]
        if SLOT_INDICES in calls.inputs:
            calls.inputs[SLOT_INDICES][:] = held
        if "sequence_lengths" in calls.inputs:
            np.maximum(lengths, 1, out=calls.inputs["sequence_lengths"])
        np.maximum(self._written[rows], held + width, out=self._written[rows])
        for name in self.extra_outputs:  # their shapes change from call to call
            calls.binding.bind_output(name, "cpu")
        self._count += 1
        calls.session.run_with_iobinding(calls.binding)
        self._note_rope()
        if self.extra_outputs:
            names = [*(present for _, present in self.past), *self._rope_outputs, "logits", *self.extra_outputs]
            outputs = dict(zip(names, calls.binding.get_outputs(), strict=True))
            self.extra = {name: outputs[name].numpy() for name in self.extra_outputs}
        return calls.logits

    def _clear_row(self, row: int, kept: int) -> None:
        written = int(self._written[row])
        for buffer in self._buffers.values():
            buffer[row, :, kept:written] = 0
        self._written[row] = min(kept, written)
        if kept == 0:
            self._forget_rope()

    def _copy_row(self, source: int, target: int, tokens: int) -> None:
        slots = min(tokens, int(self.held()[source]))
        for buffer in self._buffers.values():
            buffer[target, :, :slots] = buffer[source, :, :slots]
        self._written[target] = slots

    def _swap_rows(self, a: int, b: int) -> None:
        slots = int(self._written[[a, b]].max())
        for buffer in self._buffers.values():
            kept = buffer[a, :, :slots].copy()
            buffer[a, :, :slots] = buffer[b, :, :slots]
            buffer[b, :, :slots] = kept
        self._written[[a, b]] = self._written[[b, a]]

    def held(self) -> IntArray:
        """Slots in use of each row, `[B]`."""
        return self.row_lengths

    def cache(self) -> dict[str, list[FloatArray]]:
        return {
            name: [rows[b, :, :n].copy() for b, n in enumerate(self.held())] for name, rows in self._buffers.items()
        }


def wrap(array: np.ndarray[Any, Any]) -> Any:
    """An OrtValue on the array's own memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


class GrowingOrtRunner(OrtRunner):
    """Present tensors of one call are the past of the next; they never leave ONNX Runtime's memory.

    Rows of different length are padded on the left, the convention of Hugging Face tools; the padding stays in the
    cache as holes that `attention_mask` hides.
    """

    def _reset(self, batch_size: int) -> None:
        self._binding = self.session.io_binding()
        self._reset_rope()
        empty = {"batch_size": batch_size, "past_sequence_length": 0}
        self._values = {present: wrap(self._zeros(past, **empty)) for past, present in self.past}
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
        self._bind_rope(self._binding)
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
            for name, rows in self._held().items()
        }

    def _held(self) -> dict[str, np.ndarray[Any, Any]]:
        """The present tensors of the last call, `[B, Hkv, K, D]`."""
        return {name: value.numpy() for name, value in self._values.items()}


_NUMPY_DTYPES = {f"tensor({DTYPES[name].onnx.lower()})": np.dtype(name) for name in ("float32", "float16", "int64")}
"""By ONNX Runtime's name; those of a graph's inputs and outputs."""
