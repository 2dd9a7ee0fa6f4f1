"""Texts that a busy server makes are those that `doge_deploy.load(bundle).generate` makes alone.

    .venv/bin/python tests/serve/load/same_text.py [--requests 2000]

Greedy and seeded, whole and streamed, chat, texts and token ids, prompts of 1 to 400 tokens that often begin alike,
stop texts, penalties, logprobs, structured output; 1 to 16 requests at once, and one more in six that leaves at a
random moment. Text, reason and number of tokens must be the same, for a bundle in fp32, in int8, and one with all
logits, which guesses tokens where it runs alone.

A call of another number of rows may round the last bit otherwise, and another key may then be kept where two are almost
equal. So a text that differs needs a certificate: its prompt and tokens up to the first other one are fed again alone
and in `LAYOUTS` other ways (cut into even and uneven chunks, decoded beside 0 to 7 random neighbours), and the sampler,
with its own random numbers, picks from the logits of each. The text is a near-tie if one of them picks another token
than the run alone, or if the margin of the choice is below twice what logits differ by among these ways. Anything else
is a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from processes import export_bundles, serving

from doge_deploy import api
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.options.generation import GENERATION_CONFIG, GenerationOptions
from doge_deploy.runtime.backend import open_backend
from doge_deploy.runtime.generate import generate
from doge_deploy.runtime.sampling import Context, Sampler
from doge_deploy.runtime.slots import open_slots
from doge_deploy.serve.grammar import GrammarCompiler
from doge_deploy.text.tokenizer import Tokenizer

LAYOUTS = 24
WORDS = (
    "list of a the for in def return x + = value dog cat once upon time print range len i ( ) : é \N{DOG FACE}".split()
)
BEGINNINGS = (
    "",
    "Once upon a time there was a dog.",
    "The list of words: " * 4,
    "def f(x):\n    return x + 1\n" * 12,
    "The list of words: " * 30,
)
STOPS = ("the", " x", "\n\n", "<|eot_id|>", "e s")
PATTERNS = ("[0-9]{1,6}", "(yes|no|perhaps)", "[a-f ]{5,20}\\.")


@dataclass
class Case:
    """One request, and what it should give."""

    path: str
    body: dict[str, Any]
    prompt: str | list[dict[str, str]]
    choices: dict[str, Any]
    """In the names of `generate`."""
    pattern: str | None
    text: str = ""
    reason: str = ""
    tokens: list[int] = field(default_factory=list)


def draw(number: int, tokenizer: Tokenizer, model: str) -> Case:
    """The case of this number."""
    chosen = random.Random(number)
    words = " ".join(chosen.choices(WORDS, k=int(chosen.random() ** 2 * 90) + 1))
    text = chosen.choice(BEGINNINGS) + words
    length = 1 + int(chosen.random() ** 2 * 70)
    pattern = chosen.choice(PATTERNS) if chosen.random() < 0.1 else None
    asked: dict[str, Any] = {"repetition_penalty": chosen.choice((None, None, 1.2))}
    asked["presence_penalty"] = chosen.choice((None, None, None, 0.7))
    asked["frequency_penalty"] = chosen.choice((None, None, None, -0.4))
    if chosen.random() < 0.25:
        asked["logit_bias"] = {"1": -100, "70": 2.5}
    greedy = chosen.random() < 0.4
    if not greedy:
        asked |= {"temperature": chosen.choice((0.5, 0.9, 1.3)), "seed": number, "top_k": chosen.choice((0, 20, 50))}
        asked |= {"top_p": chosen.choice((None, 0.9)), "min_p": chosen.choice((None, 0.05))}
    stop = chosen.sample(STOPS, chosen.randrange(1, 4)) if chosen.random() < 0.3 else None
    asked = {name: value for name, value in asked.items() if value is not None}
    body = {**asked, "model": model, "max_tokens": length, "stream": chosen.random() < 0.5}
    if greedy:
        body["temperature"] = 0
    if stop:
        body["stop"] = stop
    if pattern is not None:
        body["guided_regex"] = pattern
    choices = {**asked, "max_new_tokens": length, "stop_strings": stop}
    if greedy:
        choices["do_sample"] = False
    if "logit_bias" in asked:
        choices["logit_bias"] = {int(token): bias for token, bias in asked["logit_bias"].items()}
    logprobs = chosen.random() < 0.4
    if chosen.random() < 0.4:
        messages = [{"role": "user", "content": text}]
        body |= {"messages": messages, "logprobs": logprobs}
        return Case("/v1/chat/completions", body, messages, choices, pattern)
    if logprobs:
        body["logprobs"] = 2
    body["prompt"] = tokenizer.encode(text) if chosen.random() < 0.3 else text
    return Case("/v1/completions", body, text, choices, pattern)


class Guided(Sampler):
    """Picks under a grammar."""

    def __init__(self, sampler: Sampler, grammar: Any) -> None:
        super().__init__(sampler.options)
        self._inner, self._grammar, self.tokens = sampler, grammar, []  # type: ignore[var-annotated]

    def pick(self, logits: Any, context: Any) -> int:
        if self.tokens:
            self._grammar.accept(self.tokens[-1])
        self.tokens.append(self._inner.pick(self._grammar.allow(np.asarray(logits, np.float32)), context))
        return int(self.tokens[-1])


class Alone:
    """The reference: one text at a time, and nothing kept between them."""

    def __init__(self, path: Path) -> None:
        self.bundle = open_bundle(path)
        self.model = api.load(path, threads=1, flush_denormals=True)
        self.tokenizer = Tokenizer.from_directory(path, vocab_size=self.bundle.manifest.facts.vocab_size)
        facts = self.bundle.manifest.facts
        self.compiler = GrammarCompiler(path / "tokenizer.json", facts.vocab_size, self.model.options.eos_ids)
        self._runner = open_backend(self.bundle, threads=1, flush_denormals=True)

    def ids(self, case: Case) -> list[int]:
        """Of the prompt."""
        return self.model.encode(case.prompt)

    def options(self, case: Case) -> GenerationOptions:
        """As the server merges them."""
        asked = {name: value for name, value in case.choices.items() if value is not None}
        if "temperature" in asked:
            asked["do_sample"] = True
        return GenerationOptions.with_file(
            self.bundle.read_json(GENERATION_CONFIG),
            asked,
            eos_ids=self.bundle.manifest.facts.eos_token_ids,
            source=self.bundle.path / GENERATION_CONFIG,
            vocab_size=self.bundle.manifest.facts.vocab_size,
        )

    def expect(self, case: Case) -> None:
        """Put into the case what it should give."""
        if case.pattern is not None:
            self._expect_guided(case)
            return
        found = self.model.generate(case.prompt, **case.choices, logprobs=0)
        case.text, case.tokens = found.text, [entry.token for entry in found.logprobs]
        case.reason = "stop" if found.finish_reason in ("eos", "stop") else "length"

    def _expect_guided(self, case: Case) -> None:
        """`generate` knows no grammar: its own loop, with a sampler that does; without stop texts."""
        options = self.options(case)
        case.body.pop("stop", None)
        grammar = self.compiler.compile("regex", case.pattern)
        sampler = Guided(Sampler(options.sampling), grammar)
        decoder, case.reason, ended = self.tokenizer.detokenizer(), "length", False
        room = self.bundle.manifest.max_length + 1 - len(self.ids(case))
        for token in generate(
            self._runner,
            self.ids(case),
            sampler,
            max_new_tokens=min(options.max_new_tokens, room),
            eos_ids=options.eos_ids,
        ):
            case.tokens.append(token)
            ended = token in options.eos_ids
            if not ended:
                case.text += decoder.push(token)
                check = self.compiler.compile("regex", case.pattern)
                for one in case.tokens:
                    check.accept(one)
                if check.complete:
                    ended = True
                    break
        case.text += decoder.flush()
        case.reason = "stop" if ended else "length"


async def ask(client: httpx.AsyncClient, case: Case) -> tuple[str, str, int]:
    """Text, reason and number of tokens."""
    body = case.body
    if not body["stream"]:
        response = await client.post(case.path, json=body)
        assert response.status_code == 200, f"{response.text} for {body}"
        (choice,) = response.json()["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return text, choice["finish_reason"], response.json()["usage"]["completion_tokens"]
    text, reason, tokens = "", "", 0
    async with client.stream("POST", case.path, json={**body, "stream_options": {"include_usage": True}}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
                reason = choice["finish_reason"] or reason
            tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
    return text, reason, tokens


async def ask_all(url: str, cases: list[Case], leaving: list[Case], seed: int) -> list[tuple[str, str, int]]:
    """Waves of 1 to 16 at once; those that leave among them."""
    chosen = random.Random(seed)
    results: dict[int, tuple[str, str, int]] = {}
    waiting = list(range(len(cases)))
    limit = asyncio.Semaphore(1)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        async with limit:
            results[number] = await ask(client, cases[number])

    async def leave(case: Case) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as own:
            asked = asyncio.ensure_future(own.post(case.path, json=case.body))
            await asyncio.wait((asked,), timeout=chosen.random() ** 2 * 0.2)
            asked.cancel()
            await asyncio.wait((asked,))

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        while waiting:
            at_once = chosen.randrange(1, 17)
            limit = asyncio.Semaphore(at_once)
            wave, waiting = waiting[: 4 * at_once], waiting[4 * at_once :]
            gone = [leave(leaving.pop()) for _ in range(min(len(leaving), max(len(wave) // 6, 1)))]
            await asyncio.gather(*(one(client, number) for number in wave), *gone)
    return [results[number] for number in range(len(cases))]


class Layouts:
    """The same tokens fed in other ways."""

    def __init__(self, path: Path, slots: int = 8) -> None:
        bundle = open_bundle(path)
        self._slots = open_slots(bundle, slots, threads=1, flush_denormals=True)
        self._own = self._slots.acquire()
        self._others = [self._slots.acquire() for _ in range(slots - 1)]
        self._vocab = bundle.manifest.facts.vocab_size

    def rows(self, prompt: list[int], output: list[int], seed: int | None) -> list[Any]:
        """Logits `[V]` after the prompt and after each token of the output; the prompt whole, and nobody beside it,
        where seed is None.
        """
        chosen = random.Random(seed)
        runner = self._slots
        for slot in (self._own, *self._others):
            runner.truncate(slot, 0)
        starts = [0]
        while seed is not None and starts[-1] < len(prompt):  # half of them in even chunks, half in uneven ones
            even = len(prompt) // (seed // 2 + 1) + 1
            starts.append(starts[-1] + (chosen.choice((1, 1, 2, 5, 16, 64)) if seed % 2 else even))
        for start, end in pairwise([*(start for start in starts if start < len(prompt)), len(prompt)]):
            last = runner.prefill(self._own, prompt[start:end]).numpy()[0, -1]
        rows = [last.astype(np.float32)]
        for token in output:
            others = [] if seed is None else chosen.sample(self._others, chosen.randrange(len(self._others) + 1))
            ids = [chosen.randrange(6, self._vocab) for _ in others]
            rows.append(runner.decode([*others, self._own], [*ids, token]).numpy()[-1, -1].astype(np.float32))
        return rows


def certificate(case: Case, alone: Alone, layouts: Layouts, text: str) -> dict[str, Any]:
    """Whether a text that differs is a near-tie, and the numbers for it."""
    prompt, options = alone.ids(case), alone.options(case)
    same = 0
    decoder, begun = alone.tokenizer.detokenizer(), ""
    for number, token in enumerate(case.tokens):
        begun += "" if token in options.eos_ids else decoder.push(token)
        if not text.startswith(begun):
            break
        same = number + 1
    # what a token is shows in the text only when it is whole, so some earlier ones are looked at too
    places = range(min(same, len(case.tokens) - 1), max(same - 4, -1), -1)
    output = case.tokens[: places[0]]
    ways = [layouts.rows(prompt, output, seed) for seed in (None, *range(LAYOUTS))]
    states = _random_states(case, alone, prompt, ways[0])
    looked_at = []
    for place in places:
        picks = []
        for rows in ways:
            sampler = Sampler(options.sampling)
            sampler._random.bit_generator.state = states[place]
            picks.append(_pick(case, alone, sampler, rows[place], prompt, output[:place]))
        first = ways[0][place]
        noise = max(float(np.abs(rows[place] - first).max()) for rows in ways[1:])
        best = np.sort(first)[-2:]
        margin = None if options.sampling.do_sample else float(best[1] - best[0])
        near = len(set(picks)) > 1 or (margin is not None and margin <= 2 * noise)
        found = {"near_tie": near, "place": place, "margin": margin, "noise": noise, "picks": dict(Counter(picks))}
        looked_at.append(found)
    return next((found for found in looked_at if found["near_tie"]), looked_at[0])


def _random_states(case: Case, alone: Alone, prompt: list[int], rows: list[Any]) -> list[Any]:
    """The sampler's random numbers before each token: one was drawn for each, unless only one token could come."""
    sampler, states = Sampler(alone.options(case).sampling), []
    for place, row in enumerate(rows):
        states.append(sampler._random.bit_generator.state)
        _pick(case, alone, sampler, row, prompt, case.tokens[:place])
    return states


def _pick(case: Case, alone: Alone, sampler: Sampler, row: Any, prompt: list[int], output: list[int]) -> int:
    context = Context(prompt)
    for token in output:
        context.append(token)
    if case.pattern is not None:
        grammar = alone.compiler.compile("regex", case.pattern)
        for token in output:
            grammar.accept(token)
        row = grammar.allow(row)
    return sampler.pick(row, context)


def run(path: Path, count: int, first: int) -> list[dict[str, Any]]:
    """One bundle; what is not the same, with certificates."""
    alone = Alone(path)
    cases = [draw(first + number, alone.tokenizer, path.name) for number in range(count)]
    fitting = [case for case in cases if len(alone.ids(case)) < alone.bundle.manifest.max_length - 4]
    leaving = [draw(10**6 + first + number, alone.tokenizer, path.name) for number in range(count // 6)]
    for case in fitting:
        alone.expect(case)
    with serving([path], "--slots", "8", "--served-model-name", path.name) as server:
        found = asyncio.run(ask_all(server.url, fitting, leaving, first))
        metrics = httpx.get(f"{server.url}/metrics").text
    for line in metrics.splitlines():
        if line.startswith(("doge_prefix_cache", "doge_request_success", "doge_spec_")):
            print(f"  {line}")
    layouts = Layouts(path)
    different = []
    for case, (text, reason, tokens) in zip(fitting, found, strict=True):
        if (text, reason, tokens) == (case.text, case.reason, len(case.tokens)):
            continue
        proof = certificate(case, alone, layouts, text)
        different.append(
            {"body": case.body, "text": text, "alone": case.text, "reasons": [reason, case.reason], **proof}
        )
    ties = sum(one["near_tie"] for one in different)
    print(
        f"{path.name}: {len(fitting)} texts of {sum(len(case.tokens) for case in fitting)} tokens;"
        f" {len(different)} are not what generate gives alone, {ties} of them near-ties by certificate",
        flush=True,
    )
    return different


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="of all bundles together")
    parser.add_argument("--bundles", type=Path, help="where bundles are or go; a temporary folder where not given")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bundles = export_bundles(options.bundles or Path(tempfile.mkdtemp()), ("fp32", "int8", "all"))
    faults = 0
    for name, share in (("fp32", 2), ("int8", 2), ("all", 1)):
        different = run(bundles[name], options.requests * share // 5 + 1, options.seed)
        for one in different:
            print(f"  {'near-tie' if one['near_tie'] else 'FAULT'}: {json.dumps(one)[:900]}")
        faults += sum(not one["near_tie"] for one in different)
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
