"""A Runner on ONNX Runtime's CUDA provider.

Caches lie on the device and are bound once, as past and present: the graph writes them in place. A call copies a few
whole numbers there, and its logits stay there until they are asked for; greedy text asks for the likeliest token only.

Axes: B rows, R rows of a call, Q tokens of a call, L slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.signature import (
    BATCH,
    BEST_LOGITS,
    BEST_TOKENS,
    PAST_ROPE,
    PRESENT_ROPE,
    SEQUENCE,
    with_best_tokens,
)
from doge_deploy.runtime.base import FloatArray, IntArray
from doge_deploy.runtime.cuda.memory import DeviceArray, DeviceMemory
from doge_deploy.runtime.logits import NO_TOKEN, Logits, check_current
from doge_deploy.runtime.rows import ChangingAngles, RowsRunner, row_range

if TYPE_CHECKING:
    import onnxruntime

CHUNK = 512
"""Tokens of a call that are computed at once: the mask has `[R, H, Q, L]` numbers."""


class _Call:
    """What is bound for calls of one shape over the same rows."""

    def __init__(self, runner: CudaRunner, first: int, rows: int, width: int) -> None:
        memory = runner.memory
        self.key = first, rows, width
        self.binding: Any = runner.session.io_binding()
        sizes = {BATCH: rows, SEQUENCE: width}
        self.inputs: dict[str, DeviceArray] = {}
        self.outputs: dict[str, DeviceArray] = {}
        for spec in runner.specs.inputs:
            if spec.name not in runner.caches:
                shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
                self.inputs[spec.name] = memory.array(shape, spec.dtype)
                self.binding.bind_ortvalue_input(spec.name, self.inputs[spec.name].value)
        for spec in runner.specs.outputs:
            if spec.name not in runner.present:
                shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
                self.outputs[spec.name] = memory.array(shape, spec.dtype)
                self.binding.bind_ortvalue_output(spec.name, self.outputs[spec.name].value)
        for past, present in runner.past:
            cache = runner.caches[past]
            address = cache.address + first * _row_bytes(cache)
            place = (memory.device, memory.device_id, cache.dtype.type, [rows, *cache.shape[1:]], address)
            self.binding.bind_input(past, *place)
            self.binding.bind_output(present, *place)


class _DeviceLogits(Logits):
    """Logits on the device, until somebody asks."""

    def __init__(self, runner: CudaRunner, call: _Call) -> None:
        self._runner, self._call, self._number = runner, call, runner.runs
        self._host: FloatArray | None = None

    def _read(self) -> tuple[FloatArray, bool]:
        if self._host is None:
            self._host = self._outputs("logits")
        return self._host, True

    def argmax(self) -> IntArray:
        tokens, best = self._outputs(BEST_TOKENS), self._outputs(BEST_LOGITS)
        found: IntArray = np.where(np.isfinite(best), tokens, NO_TOKEN)
        return found if self._order is None else found[self._order]

    def _outputs(self, name: str) -> Any:
        check_current(self._runner.runs == self._number)
        return self._call.outputs[name].read()


class CudaRunner(RowsRunner):
    """The lowered static graph of a bundle.

    Args:
        session: of the graph that `targets/cuda` makes.
        layout: that it was made of.
        memory: of the session's device.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        layout: Layout,
        memory: DeviceMemory,
        *,
        max_length: int,
        last: bool,
        whole_calls: bool,
        angles: ChangingAngles | None,
    ) -> None:
        super().__init__(max_length=max_length, last_logits=last)
        self.session, self.memory = session, memory
        self.signature = layout.signature
        self.specs = with_best_tokens(layout.signature)
        self.whole_calls, self.angles = whole_calls, angles
        self.past = [(past.name, present.name) for past, present in layout.signature.past()]
        self.present = {present for _, present in self.past}
        logits = next(spec for spec in layout.signature.outputs if spec.name == "logits")
        self.vocab_size = int(logits.shape[-1])
        self.caches: dict[str, DeviceArray] = {}
        """By the name of the past input, `[B, Hkv, L, D]`."""
        self.runs = 0
        """Runs of the session: each overwrites the logits of the one before."""
        self.extra: dict[str, np.ndarray[Any, Any]] = {}
        declared = {spec.name for spec in self.specs.outputs}
        self._extra_outputs = [output.name for output in session.get_outputs() if output.name not in declared]
        self._batch: int | None = None
        self._rope: IntArray = np.zeros(1, np.int64)
        self._zeros: DeviceArray | None = None
        self._spare: DeviceArray | None = None
        self._steps: dict[tuple[int, int, int], _Call] = {}
        """Decode steps, by their rows."""
        self._call: _Call | None = None
        """The last one that was no decode step."""

    def _reset(self, batch_size: int) -> None:
        """Zeroed caches: a hidden key's 0 weight still multiplies its value, which must be finite."""
        self._forget_rope()
        if batch_size == self._batch:
            for row in range(batch_size):
                self._clear_row(row, 0)
            return
        self._batch, self._call, self._zeros, self._spare = batch_size, None, None, None
        self._steps.clear()
        self.caches.clear()
        self._written: IntArray = np.zeros(batch_size, np.int64)
        for past, _ in self.signature.past():
            shape = tuple(batch_size if isinstance(axis, str) else axis for axis in past.shape)
            self.caches[past.name] = self.memory.array(shape, past.dtype)

    def _run_rows(self, first: int, input_ids: IntArray, lengths: IntArray) -> Logits:
        width = input_ids.shape[1]
        if width <= CHUNK or self.whole_calls:
            return _DeviceLogits(self, self._run_part(first, input_ids, lengths))
        return self._run_in_pieces(
            first, input_ids, lengths, CHUNK, lambda *part: self._run_part(*part).outputs["logits"].read()
        )

    def _run_part(self, first: int, input_ids: IntArray, lengths: IntArray) -> _Call:
        """A call, or a piece of one, in which rows that ended before have no real token."""
        count, width = input_ids.shape
        rows = row_range(first, count)
        call = self._call_for(first, count, width)
        values = {
            "input_ids": input_ids,
            "write_indices": self.row_lengths[rows],
            "sequence_lengths": np.maximum(lengths, 1),
            PAST_ROPE: self._rope,
        }
        for name, array in call.inputs.items():
            array.write(values[name])
        for name in self._extra_outputs:  # their shapes change from call to call
            call.binding.bind_output(name, "cpu")
        self._written[rows] = np.maximum(self._written[rows], self.row_lengths[rows] + width)
        self.runs += 1
        self.session.run_with_iobinding(call.binding)
        if PRESENT_ROPE in call.outputs:
            self._rope = call.outputs[PRESENT_ROPE].read()
        if self._extra_outputs:
            # in the order in which they were bound
            bound = [*call.outputs, *(present for _, present in self.past), *self._extra_outputs]
            given = dict(zip(bound, call.binding.get_outputs(), strict=True))
            self.extra = {name: given[name].numpy() for name in self._extra_outputs}
        return call

    def _call_for(self, first: int, rows: int, width: int) -> _Call:
        key = first, rows, width
        if width == 1:
            if key not in self._steps:
                self._steps[key] = _Call(self, first, rows, width)
            return self._steps[key]
        if self._call is None or self._call.key != key:
            self._call = None  # its memory is free for the next one
            self._call = _Call(self, first, rows, width)
        return self._call

    def _forget_rope(self) -> None:
        self._rope = np.zeros(1, np.int64)

    def _clear_row(self, row: int, kept: int) -> None:
        if self._zeros is None:
            size = max(_row_bytes(cache) for cache in self.caches.values())
            self._zeros = self.memory.array((size,), np.uint8)
        written = int(self._written[row])
        for cache in self.caches.values():
            for address, nbytes in _slots(cache, row, kept, written):
                self.memory.copy(self._zeros.address, address, nbytes)
        self._written[row] = min(kept, written)
        if kept == 0:
            self._forget_rope()

    def _copy_row(self, source: int, target: int, tokens: int) -> None:
        for cache in self.caches.values():
            pairs = zip(_slots(cache, source, 0, tokens), _slots(cache, target, 0, tokens), strict=True)
            for (begin, nbytes), (end, _) in pairs:
                self.memory.copy(begin, end, nbytes)
        self._written[target] = tokens

    def _swap_rows(self, a: int, b: int) -> None:
        if self._spare is None:
            size = max(_row_bytes(cache) for cache in self.caches.values())
            self._spare = self.memory.array((size,), np.uint8)
        for cache in self.caches.values():
            size = _row_bytes(cache)
            of_a, of_b = cache.address + a * size, cache.address + b * size
            self.memory.copy(of_a, self._spare.address, size)
            self.memory.copy(of_b, of_a, size)
            self.memory.copy(self._spare.address, of_b, size)
        self._written[[a, b]] = self._written[[b, a]]

    def cache(self) -> dict[str, list[FloatArray]]:
        held = {present: self.caches[past].read() for past, present in self.past}
        return {name: [rows[b, :, :n] for b, n in enumerate(self.row_lengths)] for name, rows in held.items()}


def _row_bytes(cache: DeviceArray) -> int:
    return cache.nbytes // cache.shape[0]


def _slots(cache: DeviceArray, row: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Where slots `begin` to `end - 1` of a row lie: address and bytes of the part of each head."""
    _, heads, slots, _ = cache.shape
    head = _row_bytes(cache) // heads
    slot = head // slots
    for index in range(heads if end > begin else 0):
        start = cache.address + row * heads * head + index * head
        yield start + begin * slot, (end - begin) * slot
