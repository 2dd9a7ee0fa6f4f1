"""Each slot gives what its text gives alone, whatever the others do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from bundles import shared_bundle
from engine_stand_ins import axes, held_runner
from random_doge import DYNAMIC, SMALL, SMALL_MOE, shared_doge
from slot_schedules import Findings, Schedule, batch_noise

from doge_deploy.bundle.engine_record import EngineProfile
from doge_deploy.bundle.manifest import Bundle, open_bundle
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.runtime.ort import open_runner, window
from doge_deploy.runtime.ort.window import WindowOrtRunner
from doge_deploy.runtime.rows import RowsRunner
from doge_deploy.runtime.slots import SlotRunner, open_slots
from doge_deploy.verify.tolerance import Limit

SLOTS = 4
WIDE = {"head_dim": 16, "vocab_size": 256, "keep_window_size": 64}
"""Heads that the lowered graph takes, tokens enough for texts without repetitions, and no window."""

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "dense-all-logits": ({}, {"logits": "all"}),
    "window": ({"keep_window_size": 8}, {}),
    "window-all-logits": ({"keep_window_size": 12, "num_key_value_heads": 1}, {"logits": "all"}),
    "sliding": ({"sliding_window": 12}, {}),
    "moe": ({**SMALL_MOE, "keep_window_size": 64}, {"routing": "per-token"}),
    "moe-window": ({**SMALL_MOE, "keep_window_size": 8}, {"routing": "per-token", "logits": "all"}),
    "int8": ({"hidden_size": 64, "intermediate_size": 64}, {"quantize": "int8"}),
}

PROFILES = (
    EngineProfile(name="prefill", axes=axes((1, 1, SLOTS), (1, 32, 64))),
    EngineProfile(name="decode", axes=axes((1, 1, SLOTS), (1, 1, 1))),
)

BACKENDS: dict[str, Callable[[Bundle], RowsRunner]] = {
    "ort": lambda bundle: open_runner(bundle, "static", threads=1),  # type: ignore[return-value]
    "ort-portable": lambda bundle: open_runner(bundle, "static", threads=1, portable=True),  # type: ignore[return-value]
    "engine": lambda bundle: held_runner(bundle, profiles=PROFILES),
}

CASES = [(config, backend) for config in CONFIGS for backend in BACKENDS if (config, backend) != ("int8", "engine")]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts drop keys often."""
    monkeypatch.setattr(window, "CHUNK", 8)
    monkeypatch.setattr(window, "SPARE", 3)


def bundle_of(config: str) -> Bundle:
    changes, options = CONFIGS[config]
    checkpoint = shared_doge(**{**SMALL, **WIDE, **changes, **{k: WIDE[k] for k in ("head_dim", "vocab_size")}})
    return open_bundle(shared_bundle(checkpoint, **options))


@dataclass
class Opened:
    """A bundle in a backend: the runner of slots, one for texts alone, and what may differ."""

    rows: RowsRunner
    alone: RowsRunner
    allowed: Limit


@cache
def opened(config: str, backend: str) -> Opened:
    bundle = bundle_of(config)
    rows, alone = BACKENDS[backend](bundle), BACKENDS[backend](bundle)
    return Opened(rows, alone, batch_noise(alone, range(2, SLOTS + 1), alone.vocab_size))


@pytest.fixture(scope="module", autouse=True)
def _close() -> Iterator[None]:
    yield
    opened.cache_clear()


def schedules(config: str, backend: str, seeds: range) -> Findings:
    case, findings = opened(config, backend), Findings()
    for seed in seeds:
        schedule = Schedule(SlotRunner(case.rows, SLOTS), case.alone, case.allowed, seed)
        findings.add(schedule.run())
        assert not findings.failures, (seed, findings.failures, schedule.log)
    print(f"\n{config} {backend}: {findings}")
    return findings


@pytest.mark.parametrize(("config", "backend"), CASES, ids=["-".join(case) for case in CASES])
def test_texts_are_those_of_a_run_alone(config: str, backend: str) -> None:
    findings = schedules(config, backend, range(2))
    assert findings.texts > 10 and findings.equal_bits > 0


@pytest.mark.sweep
@pytest.mark.parametrize(("config", "backend"), CASES, ids=["-".join(case) for case in CASES])
def test_two_hundred_schedules(config: str, backend: str) -> None:
    schedules(config, backend, range(200))
