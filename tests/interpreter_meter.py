"""Bytes that kernels load and store in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Meter:
    loaded_bytes: int = 0
    stored_bytes: int = 0
    read: set[int] = field(default_factory=set)
    """Addresses of bytes."""
    written: set[int] = field(default_factory=set)

    @property
    def memory_bytes(self) -> int:
        """Each byte that was read or written, once; what a kernel reads of its own output need not leave the chip."""
        return len(self.read | self.written)

    def note(self, pointers: Any, mask: Any, *, store: bool) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        addresses = np.asarray(pointers.data).reshape(-1)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, np.shape(pointers.data)).reshape(-1)]
        touched = {int(a) + offset for a in addresses for offset in range(size)}
        if store:
            self.stored_bytes += addresses.size * size
            self.written |= touched
        else:
            self.loaded_bytes += addresses.size * size
            self.read |= touched


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Count what is loaded and stored by masks that are true, by every program."""
    from triton.runtime.interpreter import InterpreterBuilder

    meter = Meter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        meter.note(pointers, mask, store=False)
        return load(self, pointers, mask, *others, **named)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any, **named: Any) -> Any:
        meter.note(pointers, mask, store=True)
        return store(self, pointers, value, mask, *others, **named)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store
    try:
        yield meter
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
