"""A long call in pieces: what the pieces gave, as one call gives it.

Axes: B rows, Q tokens of the call, V vocabulary, Hkv key heads, K slots in use, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from doge_deploy.runtime.base import FloatArray, IntArray


def joined_logits(parts: Sequence[FloatArray], lengths: IntArray, step: int, *, last: bool) -> FloatArray:
    """`[B, Q, V]`; where `last`, of each row those of the piece in which its last real token is, `[B, 1, V]`."""
    if not last:
        return np.concatenate(parts, axis=1)
    return np.stack([parts[part][b] for b, part in enumerate((lengths - 1) // step)])


def joined_selections(parts: Sequence[Any], batch: int) -> Any:
    """Keys kept, `[B, Hkv, Q, K]` of the last piece's K, or experts `[B*Q, k]`, row after row."""
    if parts[0].ndim != 4:
        rows = [part.reshape(batch, -1, part.shape[-1]) for part in parts]
        return np.concatenate(rows, axis=1).reshape(-1, parts[0].shape[-1])
    columns = max(part.shape[3] for part in parts)
    padded = [np.pad(part, ((0, 0), (0, 0), (0, 0), (0, columns - part.shape[3]))) for part in parts]
    return np.concatenate(padded, axis=2)
