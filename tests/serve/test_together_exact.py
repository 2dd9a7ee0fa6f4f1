"""Prompts that the scheduler feeds together give the logits that each gives alone, in a real graph.

Reference: `Runner.run`, the prompt in one call and token by token behind it, in a cache of one row. Texts hold no token
twice (see `slot_schedules`), so the sampler picks the likeliest token that is not there yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import shared_bundle
from random_doge import SMALL, SMALL_MOE, shared_doge
from scripted_requests import Digits
from slot_schedules import allowed, batch_noise, graph_noise

from doge_deploy.api import load
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.ort import open_runner, window
from doge_deploy.runtime.rows import RowsRunner
from doge_deploy.runtime.slots import SlotRunner
from doge_deploy.serve.request import Finished, Produced, Request, Started
from doge_deploy.serve.scheduler import Limits, Scheduler
from doge_deploy.verify.compare import difference
from doge_deploy.verify.noise import Noise

SLOTS = 4
WIDE = {"head_dim": 16, "vocab_size": 256, "keep_window_size": 64}

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "all-logits": ({}, {"logits": "all"}),
    "window": ({"keep_window_size": 8}, {}),
    "window-all-logits": ({"keep_window_size": 12, "num_key_value_heads": 1}, {"logits": "all"}),
    "sliding": ({"sliding_window": 12}, {}),
    "moe-window": ({**SMALL_MOE, **WIDE, "keep_window_size": 8}, {"routing": "per-token"}),
    "int8": ({"hidden_size": 64, "intermediate_size": 64}, {"quantize": "int8"}),
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts drop keys, and prompts come in pieces within a call."""
    monkeypatch.setattr(window, "CHUNK", 8)
    monkeypatch.setattr(window, "SPARE", 3)


@cache
def runners(config: str) -> tuple[RowsRunner, RowsRunner, Noise]:
    """Of the slots, of texts alone, and what the number of rows in a call may change."""
    changes, options = CONFIGS[config]
    path = shared_bundle(shared_doge(**{**SMALL, **WIDE, **changes}), **options)
    bundle = open_bundle(path)
    rows, alone = (open_runner(bundle, "static", threads=1) for _ in range(2))
    if config == "int8":
        noise = graph_noise(alone, open_runner(bundle, "static", threads=1, portable=True), alone.vocab_size)
    else:
        noise = batch_noise(alone, range(2, SLOTS + 1), alone.vocab_size)
    return rows, alone, noise


class Likeliest:
    """Picks the likeliest token that the text does not hold, and keeps the logits."""

    def __init__(self) -> None:
        self.rows: list[FloatArray] = []

    def pick(self, logits: FloatArray, context: Sequence[int]) -> int:
        if not np.isfinite(logits).all():
            raise ValueError("not finite")
        self.rows.append(logits.copy())
        masked = logits.copy()
        masked[list(context)] = -np.inf
        return int(masked.argmax())


class Texts:
    """Requests of one scheduler over a real graph, and what was called."""

    def __init__(self, config: str, **limits: int) -> None:
        self.rows, self._alone, self._noise = runners(config)
        self.slots = SlotRunner(self.rows, SLOTS)
        self.scheduler = Scheduler(self.slots, Limits(**limits))
        self.calls: list[list[int]] = []
        self.found: dict[str, tuple[Request, Likeliest, list[Any]]] = {}
        self._random = np.random.default_rng(5)
        extend = self.slots.extend

        def noting(slots: Sequence[int], ids: Any, last: int = 1) -> Any:
            self.calls.append([len(each) for each in ids])
            return extend(slots, ids, last)

        self.slots.extend = noting  # type: ignore[method-assign]

    @property
    def together(self) -> list[list[int]]:
        """Lengths of the calls that fed several prompts."""
        return [call for call in self.calls if len(call) > 1 and max(call) > 1]

    def new(self, length: int, beginning: Sequence[int] = ()) -> list[int]:
        """A prompt without repetitions."""
        more = [token for token in self._random.permutation(256).tolist() if token not in beginning]
        return [*beginning, *more[: length - len(beginning)]]

    def submit(self, name: str, prompt: Sequence[int], tokens: int = 3) -> list[int]:
        sampler, events = Likeliest(), []
        one = Request(name, list(prompt), sampler, tokens, events.append, Digits())  # type: ignore[arg-type]
        self.found[name] = one, sampler, events
        self.scheduler.submit(one)
        return list(prompt)

    def run(self) -> None:
        while not self.scheduler.idle:
            self.scheduler.step()

    def text(self, name: str) -> list[int]:
        one, _, events = self.found[name]
        return [*one.prompt_ids, *(event.token for event in events if isinstance(event, Produced))]

    def cached(self, name: str) -> int:
        return next(event.cached_tokens for event in self.found[name][2] if isinstance(event, Started))

    def finished(self, name: str) -> Finished:
        return self.found[name][2][-1]  # type: ignore[no-any-return]

    def check(self, name: str) -> None:
        """What the request saw is what its text gives alone."""
        one, sampler, _ = self.found[name]
        text, alone = np.array(self.text(name)), self._alone
        assert sampler.rows
        alone.reset(1)
        expected = [alone.run(text[None, : len(one.prompt_ids)])[0, -1]]
        for place in range(len(one.prompt_ids), len(one.prompt_ids) + len(sampler.rows) - 1):
            expected.append(alone.run(text[None, place : place + 1])[0, -1])
        found = difference([np.stack(sampler.rows)], [np.stack(expected)])
        assert found.within(allowed(self._noise, found)), (name, found)
        assert [int(row.argmax()) for row in sampler.rows] == [int(row.argmax()) for row in expected]


@pytest.mark.parametrize("config", CONFIGS)
def test_prompts_of_unequal_length_beside_a_stream_and_a_long_one(config: str) -> None:
    texts = Texts(config, step_tokens=24, alone_tokens=48, together_tokens=48)
    texts.submit("stream", texts.new(5), tokens=20)
    texts.scheduler.step()
    for name, length in (("a", 7), ("b", 3), ("c", 5)):
        texts.submit(name, texts.new(length))
    texts.submit("long", texts.new(55))
    texts.submit("d", texts.new(9))
    texts.run()
    assert texts.together == [[7, 3, 5], [7, 9]], "three short prompts, and the rest of the long one with the last"
    for name in texts.found:
        texts.check(name)


@pytest.mark.parametrize("config", CONFIGS)
def test_prompts_that_go_on_where_slots_stand_already(config: str) -> None:
    """The next turns of two conversations, and a new prompt, in one call at different places of their rows."""
    texts = Texts(config, step_tokens=24, alone_tokens=48, together_tokens=48)
    texts.submit("first", texts.new(14))
    texts.submit("second", texts.new(6))
    texts.run()
    texts.calls.clear()
    for name in ("first", "second"):
        texts.submit(f"{name} turn", texts.new(len(texts.text(name)) + 4, texts.text(name)))
    texts.submit("third", texts.new(6))
    texts.run()
    assert texts.together[0] == [5, 5, 6]
    assert texts.cached("first turn") == 14 + 2 and texts.cached("second turn") == 6 + 2
    for name in texts.found:
        texts.check(name)


@pytest.mark.parametrize("config", ["dense", "window", "all-logits"])
@pytest.mark.parametrize("leaving", ["a", "long"])
def test_a_request_that_leaves_between_the_calls_of_a_joint_prefill(config: str, leaving: str) -> None:
    texts = Texts(config, step_tokens=16, alone_tokens=16, together_tokens=16)
    texts.submit("long", texts.new(38))
    texts.submit("a", texts.new(6))
    texts.submit("b", texts.new(4))
    texts.scheduler.step()
    texts.scheduler.step()
    texts.scheduler.cancel(leaving)
    texts.submit("late", texts.new(7))
    texts.run()
    assert texts.together and texts.finished(leaving).reason == "cancelled"
    for name in texts.found:
        if name != leaving:
            texts.check(name)


@pytest.mark.parametrize("config", ["dense", "window", "all-logits"])
def test_a_row_that_overflows_in_a_joint_call_fails_alone(config: str) -> None:
    texts = Texts(config, step_tokens=16, alone_tokens=16, together_tokens=16)
    texts.submit("sick", texts.new(22))
    texts.submit("a", texts.new(6))
    texts.scheduler.step()
    slot = texts.found["sick"][0].slot
    assert slot is not None and texts.slots.length(slot) == 16
    for name, buffer in texts.rows._buffers.items():  # type: ignore[attr-defined]
        if name.endswith(".value"):
            buffer[texts.slots._row[slot], :, :8] = np.nan
    texts.run()
    assert texts.together == [[6, 6]]
    assert str(texts.finished("sick").error) == "not finite"
    texts.check("a")
    texts.submit("again", texts.new(9))
    texts.submit("other", texts.new(8))
    texts.run()
    texts.check("again")


def test_texts_of_a_bundle_are_those_of_generate(tiny_bundle: Path) -> None:
    """Bursts of prompts that often begin alike, with guesses, against the interface that knows no slots."""
    model = load(tiny_bundle, threads=1)
    slots = SlotRunner(open_runner(open_bundle(tiny_bundle), "static", threads=1), 6)  # type: ignore[arg-type]
    scheduler = Scheduler(slots, step_costs={1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4})
    words = "What is a list ? The import statement for in range def return print x = dict".split()
    random = np.random.default_rng(1)
    prompts = [" ".join(random.choice(words, int(random.integers(1, 30)))) for _ in range(18)]
    prompts = [text if number % 3 else f"The list of words: {text}" for number, text in enumerate(prompts)]
    joint, answers = 0, []
    extend = slots.extend

    def noting(rows: Sequence[int], ids: Any, last: int = 1) -> Any:
        nonlocal joint
        joint += len(rows) > 1 and max(map(len, ids)) > 1
        return extend(rows, ids, last)

    slots.extend = noting  # type: ignore[method-assign]
    for begin in range(0, len(prompts), 6):
        for text in prompts[begin : begin + 6]:
            events: list[Any] = []
            sampler: Any = type("Greedy", (), {"pick": lambda self, row, context: int(row.argmax())})()
            scheduler.submit(Request(text, model.encode(text), sampler, 12, events.append, Digits()))
            answers.append((text, events))
        while not scheduler.idle:
            scheduler.step()
    assert joint >= 3
    for text, events in answers:
        made = model.generate(text, max_new_tokens=12, do_sample=False, logprobs=0, eos_token_id=[])
        assert [event.token for event in events if isinstance(event, Produced)] == [one.token for one in made.logprobs]
