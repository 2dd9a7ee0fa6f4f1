"""Rows of different length in one array: from padding on the right (the Runner's interface) to padding on the left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from doge_deploy.runtime.base import FloatArray, IntArray


@dataclass(frozen=True)
class LeftPadded:
    """A call whose padding was moved to the left."""

    input_ids: IntArray
    """`[B, Q]`"""
    source: IntArray
    """`[B, Q]`: the column of the right-padded call that stands here; negative for padding."""

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        """`[B, Q]`: not padding."""
        return self.source >= 0

    def restore(self, outputs: FloatArray) -> FloatArray:
        """`[B, Q, ...]` in left-padded order -> right-padded order; what stands at padding has no meaning."""
        width = self.source.shape[1]
        shift = -self.source[:, :1]
        index = np.minimum(np.arange(width) + shift, width - 1)
        return np.take_along_axis(outputs, index.reshape(*index.shape, *(1,) * (outputs.ndim - 2)), axis=1)


def left_padded(input_ids: IntArray, lengths: IntArray) -> LeftPadded:
    """Move the `lengths[b]` real tokens of each row of `input_ids` `[B, Q]` to its right end."""
    width = input_ids.shape[1]
    if np.all(lengths == width):
        return LeftPadded(input_ids, np.broadcast_to(np.arange(width), input_ids.shape))
    source = np.arange(width) - (width - lengths[:, None])
    # Padding repeats the row's first token: any valid id will do.
    return LeftPadded(np.take_along_axis(input_ids, np.maximum(source, 0), axis=1), source)
