"""What is done the first time only is done before a client is there, and leaves nothing in the slots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.slots import SlotRunner, open_slots
from doge_deploy.serve.scheduler import Limits
from doge_deploy.serve.start import ServeOptions, open_text, warm_up

GROWTH = """
import sys
from pathlib import Path
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.slots import open_slots

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

slots = open_slots(open_bundle(Path(sys.argv[1])), 48, threads=1)
before = resident()
slots.take_memory()
print(sum(buffer.nbytes for buffer in slots._runner._buffers.values()), resident() - before)
"""
"""In a process of its own: here earlier tests have left memory that is used again."""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/statm says how much memory is there")
def test_the_memory_of_all_slots_is_there_before_they_are_used(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", GROWTH, str(tiny_bundle)]
    size, grown = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert size > 2e7 and grown > 0.9 * size


def test_texts_that_are_there_stay(tiny_bundle: Path) -> None:
    found = []
    for takes in (False, True):
        slots = open_slots(open_bundle(tiny_bundle), 2, threads=1)
        slot = slots.acquire()
        slots.prefill(slot, [5, 6, 7])
        if takes:
            slots.take_memory()
        found.append(slots.decode([slot], [8]).numpy())
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_moe_bundle"])
def test_the_largest_calls_are_made_and_nothing_stays(bundle: str, request: pytest.FixtureRequest) -> None:
    opened = open_bundle(request.getfixturevalue(bundle))
    slots = open_slots(opened, 1 if opened.manifest.routing_mixes else 4, threads=1)
    calls: list[list[int]] = []
    extend = slots.extend

    def noting(used: Any, ids: Any, last: int = 1) -> Any:
        calls.append([len(each) for each in ids])
        return extend(used, ids, last)

    slots.extend = noting  # type: ignore[method-assign]
    warm_up(slots, Limits(alone_tokens=200, together_tokens=160))
    assert calls == ([[200], [40, 40, 40, 40]] if slots.slots == 4 else [[200]])
    assert slots.free == slots.slots and not slots._runner.row_lengths.any()
    assert all(not buffer.any() for buffer in slots._runner._buffers.values())  # type: ignore[attr-defined]


def test_a_server_is_warmed_up(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[SlotRunner] = []
    monkeypatch.setattr(SlotRunner, "take_memory", lambda slots: taken.append(slots))
    open_text(open_bundle(tiny_bundle), "x", ServeOptions(slots=2, speculate=False), lambda events: None)
    assert len(taken) == 1
