"""A step of the lowered static graph neither reads nor writes slots that its row does not use.

Said without a clock: those slots hold NaN, which would spread from anything that is computed with them.
What a step costs by what the slots hold is printed by examples/03_benchmarks/rows_and_slots.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundles import shared_bundle

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.ort.runners import StaticOrtRunner

HELD = {"one row": [7], "a long one and short ones": [40, 3, 3, 11]}


def opened(quantize: str | None, held: list[int], *, portable: bool) -> StaticOrtRunner:
    """A runner whose rows hold so many tokens."""
    bundle = open_bundle(shared_bundle("doge-tiny", num_layers=1, quantize=quantize))
    runner = open_runner(bundle, threads=1, portable=portable)
    assert isinstance(runner, StaticOrtRunner)
    runner.reset(len(held))
    ids = np.random.default_rng(0).integers(3, 1000, (len(held), max(held)))
    runner.run(ids, held)
    return runner


def step(runner: StaticOrtRunner, poison: bool, width: int) -> tuple[Any, dict[str, list[Any]]]:
    """Logits of a call of `width` tokens and what rows then hold, with NaN in the slots that no row uses by then."""
    if poison:
        for buffer in runner._buffers.values():
            for row, held in enumerate(runner.row_lengths):
                buffer[row, :, held + width :] = np.nan
    ids = np.random.default_rng(1).integers(3, 1000, (len(runner.row_lengths), width))
    logits = runner.run(ids).copy()
    if poison:
        for buffer in runner._buffers.values():
            for row, held in enumerate(runner.row_lengths):
                assert np.isnan(buffer[row, :, held:]).all(), "a slot beyond the row was written"
    return logits, runner.cache()


@pytest.mark.parametrize("width", [1, 3], ids=["step", "three tokens"])
@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
@pytest.mark.parametrize("quantize", [None, "int8"], ids=["fp32", "int8"])
def test_slots_that_no_row_uses_are_not_touched(quantize: str | None, held: list[int], width: int) -> None:
    expected, cache = step(opened(quantize, held, portable=False), False, width)
    logits, kept = step(opened(quantize, held, portable=False), True, width)
    np.testing.assert_array_equal(logits, expected)
    for name, rows in cache.items():
        for found, row in zip(kept[name], rows, strict=True):
            np.testing.assert_array_equal(found, row)


def test_the_standard_graph_does_touch_them() -> None:
    """So the test above can fail."""
    assert np.isnan(step(opened(None, HELD["one row"], portable=True), True, 1)[0]).all()
