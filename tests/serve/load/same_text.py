"""Texts that a busy server makes are those that `doge_deploy.load(bundle).generate` makes alone.

    .venv/bin/python tests/serve/load/same_text.py [--requests 2000]

Greedy and seeded, whole and streamed, chat, texts and token ids, prompts of 1 to 400 tokens that often begin alike,
stop texts, penalties, logprobs, structured output; 1 to 16 requests at once, and one more in six that leaves at a
random moment. Text, reason and number of tokens must be the same, for a bundle in fp32, in int8, and one with all
logits, which guesses tokens where it runs alone.

A call of another number of rows may round the last bit otherwise, and another key may then be kept where two are almost
equal. So a text that differs needs a certificate, which explains all of it: tokens that may have been picked instead
(`near_ties.py`), and between them what the run alone gives after such a token. For that the tokens before are fed alone
and in `LAYOUTS` other ways (behind the beginning of another text, in even and uneven pieces, decoded beside 0 to 7
random neighbours), and the number that the sampler draws must lie between the boundaries of the token, as far as these
move among the ways. A text that is not explained is a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from near_ties import possible_tokens
from processes import export_bundles, serving

from doge_deploy import api
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.options.generation import GENERATION_CONFIG, GenerationOptions
from doge_deploy.runtime.backend import open_backend
from doge_deploy.runtime.generate import generate
from doge_deploy.runtime.sampling import Context, Sampler
from doge_deploy.runtime.slots import open_slots
from doge_deploy.serve.grammar.compiler import Grammar, GrammarCompiler
from doge_deploy.serve.text import StreamedText
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


class Followed(Sampler):
    """Picks under a grammar, where there is one; the first tokens are given, and the others are its own. What it saw is
    kept: the scores, and the state of its random numbers before each pick.
    """

    def __init__(self, options: GenerationOptions, grammar: Grammar | None, given: Sequence[int]) -> None:
        super().__init__(options.sampling)
        self._grammar, self._given, self._eos_ids = grammar, list(given), options.eos_ids
        self.tokens: list[int] = []
        self.states: list[Any] = []

    def pick(self, logits: Any, context: Any) -> int:
        self.states.append(self._random.bit_generator.state)
        token = super().pick(self.allowed(logits), context)  # which draws its number, whatever is made of it
        if len(self.tokens) < len(self._given):
            token = self._given[len(self.tokens)]
        self.tokens.append(token)
        if self._grammar is not None and token not in self._eos_ids:
            self._grammar.accept(token)
        return token

    def allowed(self, logits: Any) -> Any:
        """Logits of what the grammar allows."""
        row = np.asarray(logits, np.float32)
        return row if self._grammar is None else self._grammar.allow(row)

    @property
    def complete(self) -> bool:
        """The grammar allows nothing more."""
        return self._grammar is not None and self._grammar.complete


@dataclass
class Run:
    """A text of one request at a time."""

    text: str
    reason: str
    tokens: list[int]
    states: list[Any]

    @property
    def answer(self) -> tuple[str, str, int]:
        """What a client sees."""
        return self.text, self.reason, len(self.tokens)


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
        if case.pattern is not None:  # `generate` knows no grammar: its own loop, with a sampler that does
            case.body.pop("stop", None)
            case.choices.pop("stop_strings", None)
            found = self.follow(case, ())
            case.text, case.reason, case.tokens = found.text, found.reason, found.tokens
            return
        made = self.model.generate(case.prompt, **case.choices, logprobs=0)
        case.text, case.tokens = made.text, [entry.token for entry in made.logprobs]
        case.reason = "stop" if made.finish_reason in ("eos", "stop") else "length"

    def grammar(self, case: Case) -> Grammar | None:
        """At its beginning."""
        return None if case.pattern is None else self.compiler.compile("regex", case.pattern)

    def follow(self, case: Case, given: Sequence[int]) -> Run:
        """The text whose first tokens are given, by `generate`'s loop."""
        options, ids = self.options(case), self.ids(case)
        sampler = Followed(options, self.grammar(case), given)
        text = StreamedText(self.tokenizer.detokenizer(), options.stop)
        pieces, reason = [], "length"
        room = self.bundle.manifest.max_length + 1 - len(ids)
        most = min(options.max_new_tokens, room)
        for token in generate(self._runner, ids, sampler, max_new_tokens=most, eos_ids=options.eos_ids):
            if token in options.eos_ids:
                reason = "stop"
                break
            pieces.append(text.push(token))
            if text.stopped or sampler.complete:
                reason = "stop"
                break
        pieces.append(text.flush())
        reason = "stop" if text.stopped else reason
        return Run("".join(pieces), reason, sampler.tokens, sampler.states)


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


def _cuts(length: int, seed: int | None, chosen: random.Random) -> list[int]:
    """Where the pieces of a prompt begin, and the end of the last one: even pieces, uneven ones, and one cut anywhere,
    as where a slot held the beginning already, of a text that went on in another way.
    """
    if seed is None or length < 2:
        return [0, length]
    if seed % 3 == 0:
        return [0, chosen.randrange(1, length), length]
    starts = [0]
    while starts[-1] < length:
        even = length // (seed // 3 + 2) + 1
        starts.append(starts[-1] + (chosen.choice((1, 1, 2, 5, 16, 64)) if seed % 3 == 1 else even))
    return [*(start for start in starts if start < length), length]


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
        for start, end in pairwise(_cuts(len(prompt), seed, chosen)):
            before = seed is not None and seed % 3 == 0 and end < len(prompt)
            behind = [chosen.randrange(6, self._vocab) for _ in range(chosen.randrange(64 * before + 1))]
            last = runner.prefill(self._own, [*prompt[start:end], *behind]).numpy()[0, -1]
            if behind and runner.can_cut(self._own):
                runner.truncate(self._own, end)
            elif behind:  # it has dropped keys: a server would not keep it either
                runner.truncate(self._own, 0)
                last = runner.prefill(self._own, prompt[:end]).numpy()[0, -1]
        rows = [last.astype(np.float32)]
        for token in output:
            others = [] if seed is None else chosen.sample(self._others, chosen.randrange(len(self._others) + 1))
            ids = [chosen.randrange(6, self._vocab) for _ in others]
            rows.append(runner.decode([*others, self._own], [*ids, token]).numpy()[-1, -1].astype(np.float32))
        return rows


MOST_TRIED = 200
"""Beginnings of one text that are followed: where another key was kept early, many later tokens may be other ones."""


@dataclass
class Certificates:
    """Explains texts of one bundle."""

    alone: Alone
    layouts: Layouts
    ways: int = LAYOUTS
    """In how many ways the tokens before a place are fed, beside the one of the run alone."""

    def explain(
        self,
        case: Case,
        answer: tuple[str, str, int],
        given: Sequence[int] = (),
        tried: set[tuple[int, ...]] | None = None,
    ) -> list[dict[str, Any]] | None:
        """The turns by which the text of the run alone becomes that of `answer`; None where there are none.

        Args:
            case: the request.
            answer: text, reason and number of tokens that the server gave.
            given: first tokens, which were explained already.
            tried: all that was given before.
        """
        tried = set() if tried is None else tried
        if tuple(given) in tried or len(tried) > MOST_TRIED:
            return None
        tried.add(tuple(given))
        found = self.alone.follow(case, given)
        if found.answer == answer:
            return []
        places = self._places(case, found.tokens, answer[0], len(given))
        if not places:
            return None
        output = found.tokens[: places[0]]
        prompt = self.alone.ids(case)
        ways = [self.layouts.rows(prompt, output, seed) for seed in (None, *range(self.ways))]
        for place in places:
            possible = self._possible(case, [rows[place] for rows in ways], found, place)
            for token in possible:
                if token == found.tokens[place] or not self._begins(case, [*found.tokens[:place], token], answer[0]):
                    continue
                rest = self.explain(case, answer, [*found.tokens[:place], token], tried)
                if rest is not None:
                    turn = {"place": place, "from": found.tokens[place], "to": token, "possible": possible}
                    return [turn, *rest]
        return None

    def _possible(self, case: Case, rows: Sequence[Any], found: Run, place: int) -> list[int]:
        """The tokens that may be picked there, by the logits of each way to feed the tokens before."""
        options = self.alone.options(case).sampling
        context = Context(self.alone.ids(case))
        grammar = self.alone.grammar(case)
        for token in found.tokens[:place]:
            context.append(token)
            if grammar is not None:
                grammar.accept(token)
        sampler = Sampler(options)
        sampler._random.bit_generator.state = found.states[place]
        allowed = [row if grammar is None else grammar.allow(row) for row in rows]
        return possible_tokens(sampler, allowed, context, float(sampler._random.random()))

    def _places(self, case: Case, tokens: list[int], text: str, first: int) -> list[int]:
        """Where the texts part: what a token is shows only when it is whole, so some earlier places are looked at too;
        and what is withheld may be the beginning of a stop text.
        """
        same = first
        while same < len(tokens) and self._begins(case, tokens[: same + 1], text):
            same += 1
        return list(range(min(same, len(tokens) - 1), max(same - 5, first - 1), -1))

    def _begins(self, case: Case, tokens: Sequence[int], text: str) -> bool:
        """Whether a text may begin with these tokens, as far as whole characters say."""
        options = self.alone.options(case)
        shown = StreamedText(self.alone.tokenizer.detokenizer(), options.stop)
        return text.startswith("".join(shown.push(token) for token in tokens if token not in options.eos_ids))


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
    few, many = Certificates(alone, layouts), Certificates(alone, layouts, 4 * LAYOUTS)
    different = []
    for case, answer in zip(fitting, found, strict=True):
        if answer == (case.text, case.reason, len(case.tokens)):
            continue
        turns = few.explain(case, answer)
        if turns is None:  # a few ways may not show how far a boundary moves
            turns = many.explain(case, answer)
        ends = {"reasons": [answer[1], case.reason], "tokens": [answer[2], len(case.tokens)]}
        different.append({"turns": turns, **ends, "text": answer[0], "alone": case.text, "body": case.body})
    explained = [one["turns"] for one in different if one["turns"] is not None]
    print(
        f"{path.name}: {len(fitting)} texts of {sum(len(case.tokens) for case in fitting)} tokens;"
        f" {len(different)} are not what generate gives alone, {len(explained)} of them explained by near-ties"
        f" ({Counter(map(len, explained))}: number of turns)",
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
            print(f"  {'FAULT' if one['turns'] is None else 'near-tie'}: {json.dumps(one)[:900]}")
        faults += sum(one["turns"] is None for one in different)
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
