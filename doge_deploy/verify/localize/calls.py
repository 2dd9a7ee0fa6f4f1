"""The calls of a case as a layout's graph sees them: ids, positions, and which keys a row may see.

Axes: B rows, Q tokens of a call, P columns of the cache before it, K after it; a column is a slot of a static cache and
a token, padding included, of a growing one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from doge_deploy.bundle.signature import UNCACHED
from doge_deploy.config.model import DogeFacts
from doge_deploy.runtime.padding import left_padded
from doge_deploy.verify.cases import Call
from doge_deploy.verify.compare import Array


@dataclass(frozen=True)
class CallView:
    """One call."""

    ids: Array
    """`[B, Q]` int64, as the graph gets them."""
    positions: Array
    """`[B, Q]` int64."""
    lengths: Array
    """`[B]`: real tokens of the call."""
    real: Array
    """`[B, Q]` bool."""
    first: Array
    """`[B]`: column of each row's first new token."""
    visible: Array
    """`[B, Q, K]` bool."""
    held: Array
    """`[B, K]` bool: columns that hold a real token after the call."""
    last: Array
    """`[B]`: the token, among the Q, that a head of one token reads."""
    rope_length: int
    """Tokens of the longest text before this call, see `Signature.remembers_rope`."""

    @property
    def columns(self) -> int:
        """K."""
        return int(self.visible.shape[2])


def view_calls(calls: Sequence[Call], layout: str, facts: DogeFacts) -> list[CallView]:
    """Every call of a case in the order in which it is run, on fresh rows."""
    views: list[CallView] = []
    batch = len(calls[0].lengths)
    before = np.zeros(batch, np.int64)
    past_real = np.zeros((batch, 0), bool)
    longest = 0
    for call in calls:
        view = (_static if layout == "static" else _uncached if layout == UNCACHED else _growing)(
            call, before, past_real, facts, longest
        )
        views.append(view)
        before = before + call.lengths
        past_real = view.held
        longest = _remembered(longest, int(view.positions.max()) + 1, facts)
    return views


def _remembered(longest: int, reached: int, facts: DogeFacts) -> int:
    """RoPE's memory after a call that reaches so many tokens; transformers' `dynamic_rope_update`."""
    original = facts.stateless_length
    if original is None:
        return 0
    return original if reached < original else max(longest, reached)


def _near(columns: Array, rows: Array, facts: DogeFacts) -> Array:
    """`[B, Q, K]`: a column is at or before a row's own, and within the sliding window."""
    near: Array = columns <= rows[:, :, None]
    if facts.sliding_window:
        near = near & (columns > rows[:, :, None] - facts.sliding_window)
    return near


def _static(call: Call, before: Array, _past: Array, facts: DogeFacts, longest: int) -> CallView:
    width = call.input_ids.shape[1]
    slots = before[:, None] + np.arange(width)
    columns = np.arange(int(before.max()) + width)
    return CallView(
        ids=call.input_ids,
        positions=slots,
        lengths=call.lengths,
        real=np.arange(width) < call.lengths[:, None],
        first=before,
        visible=_near(columns, slots, facts),
        held=columns < (before + call.lengths)[:, None],
        last=call.lengths - 1,
        rope_length=longest,
    )


def _growing(call: Call, before: Array, past: Array, facts: DogeFacts, longest: int) -> CallView:
    left = left_padded(call.input_ids, call.lengths)
    held = np.concatenate((past, left.real), axis=1)
    batch, width = call.input_ids.shape
    first = np.full(batch, past.shape[1])
    rows = first[:, None] + np.arange(width)
    return CallView(
        ids=left.input_ids,
        positions=np.maximum(before[:, None] + left.source, 0),
        lengths=call.lengths,
        real=left.real,
        first=first,
        visible=_near(np.arange(held.shape[1]), rows, facts) & held[:, None],
        held=held,
        last=np.full(batch, width - 1),
        rope_length=longest,
    )


def _uncached(call: Call, before: Array, _past: Array, facts: DogeFacts, longest: int) -> CallView:
    batch, width = call.input_ids.shape
    real = np.arange(width) < call.lengths[:, None]
    padding = call.input_ids if facts.pad_token_id is None else facts.pad_token_id
    columns = np.tile(np.arange(width), (batch, 1))
    return CallView(
        ids=np.where(real, call.input_ids, padding),
        positions=columns,
        lengths=call.lengths,
        real=real,
        first=before,
        visible=_near(np.arange(width), columns, facts) & real[:, None],
        held=real,
        last=call.lengths - 1,
        rope_length=longest,
    )
