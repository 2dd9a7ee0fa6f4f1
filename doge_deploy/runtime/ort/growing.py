"""The growing layout without growing: past and present are the same buffers, which the graph writes in place.

A lowered growing graph takes the number of tokens from `attention_mask`, so its buffers may have slots to spare.
Reference: `GrowingOrtRunner`, which hands tensors of just the right size from call to call, as optimum does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doge_deploy.bundle.signature import PAST
from doge_deploy.runtime.base import FloatArray, IntArray
from doge_deploy.runtime.ort.runners import GrowingOrtRunner, wrap

FIRST_SLOTS = 256
"""Slots of the first buffers; full ones are copied into buffers of twice the size."""


class InPlaceGrowingOrtRunner(GrowingOrtRunner):
    """Runs a graph that `targets.ort.growing_attention` made.

    Padding takes up slots, so there may be more of them than a row may have tokens.
    """

    _buffers: dict[str, np.ndarray[Any, Any]] | None = None
    """By name of the present tensor, `[B, Hkv, slots, D]`; what is beyond the tokens so far is never read."""
    _width = 0
    """Q of the calls that `_inputs` and `_logits` are for; 0 where there are none."""

    def _reset(self, batch_size: int) -> None:
        self._reset_rope()
        self.real = np.zeros((batch_size, 0), bool)
        if self._buffers is None or len(next(iter(self._buffers.values()))) != batch_size:
            self._width = 0
            sizes = {"batch_size": batch_size, PAST: FIRST_SLOTS}
            self._bind_buffers({present: self._zeros(past, **sizes) for past, present in self.past})

    def _bind_buffers(self, buffers: dict[str, np.ndarray[Any, Any]]) -> None:
        self._buffers, self._width, self._binding = buffers, 0, self.session.io_binding()
        for past, present in self.past:
            value = wrap(buffers[present])
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._bind_rope(self._binding)

    def _bind_width(self, batch: int, width: int) -> None:
        self._width, sizes = width, {"batch_size": batch, "sequence_length": width}
        self._inputs = {name: self._zeros(name, **sizes) for name in ("input_ids", "position_ids")}
        self._logits: FloatArray = self._zeros("logits", **sizes)
        for name, array in self._inputs.items():
            self._binding.bind_ortvalue_input(name, wrap(array))
        self._binding.bind_ortvalue_output("logits", wrap(self._logits))

    def run_masked(self, input_ids: IntArray, attention_mask: IntArray, position_ids: IntArray) -> FloatArray:
        assert self._buffers is not None
        needed, slots = attention_mask.shape[1], next(iter(self._buffers.values())).shape[2]
        if needed > slots:
            self._grow(max(needed, 2 * slots), needed - input_ids.shape[1])
        if input_ids.shape[1] != self._width:
            self._bind_width(*input_ids.shape)
        self._inputs["input_ids"][:] = input_ids
        self._inputs["position_ids"][:] = position_ids
        self._binding.bind_cpu_input("attention_mask", np.ascontiguousarray(attention_mask))
        for name in self.extra_outputs:  # their shapes change from call to call
            self._binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(self._binding)
        self._note_rope()
        if self.extra_outputs:
            names = [*(present for _, present in self.past), *self._rope_outputs, "logits", *self.extra_outputs]
            outputs = dict(zip(names, self._binding.get_outputs(), strict=True))
            self.extra = {name: outputs[name].numpy() for name in self.extra_outputs}
        return self._logits.copy()

    def _grow(self, slots: int, used: int) -> None:
        """Buffers of `slots` slots, the first `used` of them filled as before."""
        assert self._buffers is not None
        larger = {}
        for past, present in self.past:
            old = self._buffers[present]
            larger[present] = self._zeros(past, **{"batch_size": len(old), PAST: slots})
            larger[present][:, :, :used] = old[:, :, :used]
        self._bind_buffers(larger)

    def _held(self) -> dict[str, np.ndarray[Any, Any]]:
        assert self._buffers is not None
        return {name: buffer[:, :, : self.real.shape[1]] for name, buffer in self._buffers.items()}
