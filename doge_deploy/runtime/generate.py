"""Text from a runner: the loop of prefill and decode steps, its options, stop strings and measurements.

One row at a time (batch 1). Axes: Q tokens of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np

from doge_deploy.errors import UsageError
from doge_deploy.options.generation import GenerationOptions
from doge_deploy.runtime.base import FloatArray, Runner
from doge_deploy.runtime.logprobs import RecordingSampler, TokenLogprobs
from doge_deploy.runtime.sampling import Context, Sampler
from doge_deploy.runtime.speculation import Guesser
from doge_deploy.runtime.tokenizer import Detokenizer, Tokenizer

FinishReason = Literal["eos", "stop", "max_new_tokens", "max_length"]


def check_prompt(prompt_ids: Sequence[int], max_length: int) -> None:
    """Raises UsageError where a prompt is empty or longer than `max_length` tokens."""
    if not prompt_ids:
        raise UsageError("the prompt is empty and the tokenizer has no bos token; give at least one token")
    if len(prompt_ids) > max_length:
        raise UsageError(
            f"the prompt has {len(prompt_ids)} tokens and the bundle's max_length is {max_length}:"
            " shorten it, or export with a larger --max-length where the checkpoint allows it"
        )


def generate(
    runner: Runner,
    prompt_ids: Sequence[int],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    prefill_chunk: int | None = None,
    cached: int = 0,
    guesser: Guesser | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token at a time.

    A token is given out before the next one is computed. It ends after a token of `eos_ids`, which is given
    out too, after `max_new_tokens`, or when the row is full: the last token needs no place in it.

    Args:
        runner: its rows are reset unless `cached` is given; afterwards it holds all tokens but the last.
        prompt_ids: at least one and at most `runner.max_length` ids.
        sampler: picks from the logits.
        max_new_tokens: at least 1.
        eos_ids: tokens that end a text.
        prefill_chunk: feed the prompt this many tokens at a time, to bound memory; all at once where None.
        cached: how many first ids of the prompt the runner's one row holds already; the others are fed.
        guesser: of the same runner: guesses tokens and checks several in a call, which changes the time that a text
            takes and not the text. Close the iterator if it is not read to its end: the runner may hold guesses.

    Raises:
        UsageError: the prompt is empty or too long, or a number is out of its range.
        UnsupportedModelError: the model gave NaN or infinity.
    """
    check_prompt(prompt_ids, runner.max_length)
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk={prefill_chunk}: must be at least 1")
    if cached and (runner.row_lengths.tolist() != [cached] or cached >= len(prompt_ids)):
        raise UsageError(
            f"cached={cached}: the runner's rows hold {runner.row_lengths.tolist()} tokens,"
            f" the prompt has {len(prompt_ids)}"
        )
    text = _Text(runner, Context(prompt_ids), sampler, max_new_tokens, frozenset(eos_ids))
    if guesser is not None:
        return _guessed(text, prefill_chunk, cached, guesser)
    return _tokens(text, prefill_chunk, cached)


@dataclass(frozen=True)
class _Text:
    """A text in the making."""

    runner: Runner
    context: Context
    """Grows by every token."""
    sampler: Sampler
    max_new_tokens: int
    eos_ids: frozenset[int]

    def begin(self, chunk: int | None, cached: int) -> FloatArray:
        """Feed the prompt, of which the runner holds the `cached` first tokens; the logits `[V]` of its last one."""
        if not cached:
            self.runner.reset()
        return _prefill(self.runner, self.context[cached:], chunk)

    def pick(self, logits: FloatArray) -> int:
        """The next token."""
        token = self.sampler.pick(logits, self.context)
        self.context.append(token)
        return token

    def ends(self, token: int, count: int) -> bool:
        """Whether `token`, the `count`-th that was picked, is the last one."""
        return token in self.eos_ids or count == self.max_new_tokens or len(self.context) > self.runner.max_length


def _tokens(text: _Text, prefill_chunk: int | None, cached: int) -> Iterator[int]:
    """The loop of `generate`."""
    logits = text.begin(prefill_chunk, cached)
    for count in range(1, text.max_new_tokens + 1):
        token = text.pick(logits)
        yield token
        if text.ends(token, count):
            return
        logits = _feed(text.runner, [token])


def _guessed(text: _Text, prefill_chunk: int | None, cached: int, guesser: Guesser) -> Iterator[int]:
    """The same with guesses. A token of a guess counts where it is what the sampler picks, with the random numbers that
    it would have used anyway, and only when it is asked for: who stops reading leaves the sampler where it was.
    """
    rows = text.begin(prefill_chunk, cached)[None]
    guesser.begin(text.context)
    draft: list[int] = []
    right = 0
    try:
        for count in range(1, text.max_new_tokens + 1):
            token = text.pick(rows[right])
            guesser.append(token)
            yield token
            if text.ends(token, count):
                return
            if right < len(draft) and token == draft[right]:
                right += 1
                continue
            if draft:
                guesser.learn(len(draft), right)
                guesser.cut(len(text.context) - 1)
            draft, right = guesser.draft(text.max_new_tokens - count - 1), 0
            rows = guesser.feed([token, *draft])
    finally:
        guesser.cut(len(text.context) - 1)


def _prefill(runner: Runner, ids: Sequence[int], chunk: int | None) -> FloatArray:
    """Feed `ids` in chunks; the logits `[V]` of the last one."""
    width = chunk or len(ids)
    *first, last = (ids[start : start + width] for start in range(0, len(ids), width))
    for part in first:
        _feed(runner, part)
    return _feed(runner, last)


def _feed(runner: Runner, ids: Sequence[int]) -> FloatArray:
    """One call with Q = len(ids); the logits `[V]` of the last token."""
    logits: FloatArray = runner.run(np.array([ids], np.int64))[0, -1]
    return logits


class StopStrings:
    """Ends a text before the first of some strings, whatever pieces the text comes in.

    What could be the beginning of one is held back until it is known. Of several strings the one that is
    complete first counts (of those the longest), so that it does not matter how the text is cut into pieces.

    Special tokens are not part of the text, but their own text may be, or be part of, a string that ends it: strings
    are looked for in the text with special tokens, as transformers does, and in the text without, of which nothing
    that was asked to end it may come out.

    Reference: `StopStringCriteria` of transformers/generation/stopping_criteria.py.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._held = _Marked()
        """What may be the beginning of a string."""
        self._later: list[tuple[int, str]] = []
        """Special tokens that stand behind so many characters which are still to come."""
        self.stopped = False
        """Whether one was found; nothing more comes out then."""

    def push(self, piece: str, special: str = "", pending: str = "") -> str:
        """The text that is certain after one more token.

        Args:
            piece: what the token completed.
            special: its own text, where it is a special token.
            pending: what the detokenizer would give if no more tokens came.
        """
        if self.stopped:
            return ""
        self._later = self._held.extend(piece, self._later)
        if special:
            self._later.append((len(pending), special))
            self._later = self._held.extend("", self._later)
        view = self._held.copy()
        view.extend(pending, self._later)
        ends = [*_ends(view.text, self._stop)]
        visible, places = view.visible()
        if len(visible) < len(view.text):
            ends += [(places[end - 1] + 1, places[start]) for end, start in _ends(visible, self._stop)]
        if ends:
            _, certain = min(ends)
            self.stopped, self._held, self._later = True, _Marked(), []
            return view.take(certain)
        visible, places = self._held.visible()
        length = len(self._held.text)
        certain = min(length - self._beginning(self._held.text), places[len(visible) - self._beginning(visible)])
        return self._held.take(certain)

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._held.take(len(self._held.text))

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that one of the strings begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class _Marked:
    """A text of which some characters are not shown: those of special tokens."""

    def __init__(self, text: str = "", shown: Sequence[bool] = ()) -> None:
        self.text = text
        self._shown = list(shown)

    def copy(self) -> _Marked:
        return _Marked(self.text, self._shown)

    def extend(self, piece: str, special: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """Append `piece` with special tokens behind as many of its characters; returns those that are behind it."""
        done = 0
        left = []
        for count, token in special:
            if count > len(piece):
                left.append((count - len(piece), token))
                continue
            self.text += piece[done:count] + token
            self._shown += [True] * (count - done) + [False] * len(token)
            done = count
        self.text += piece[done:]
        self._shown += [True] * (len(piece) - done)
        return left

    def visible(self) -> tuple[str, list[int]]:
        """What is shown, and the place of each of its characters and of its end."""
        places = [place for place, shown in enumerate(self._shown) if shown]
        return "".join(self.text[place] for place in places), [*places, len(self.text)]

    def take(self, count: int) -> str:
        """What is shown of the first `count` characters, which go away."""
        text = "".join(self.text[place] for place in range(count) if self._shown[place])
        self.text, self._shown = self.text[count:], self._shown[count:]
        return text


def _ends(text: str, stop: Sequence[str]) -> Iterator[tuple[int, int]]:
    """End and start of the first occurrence of each string that `text` holds."""
    for string in stop:
        if (start := text.find(string)) >= 0:
            yield start + len(string), start


@dataclass
class Statistics:
    """What one generation took. Times are of model and sampling, not of whoever reads the text."""

    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, those that an earlier turn had left in the KV cache."""
    new_tokens: int = 0
    first_token_ms: float = 0.0
    """Prefill and the choice of the first token."""
    decode_ms: float = 0.0
    """All tokens after the first."""
    finish_reason: FinishReason | None = None
    """None while it runs."""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first by the time they took; None where there are none."""
        return (self.new_tokens - 1) / self.decode_ms * 1000 if self.decode_ms > 0 else None

    def add_token(self, elapsed_ms: float) -> None:
        """Count a token that took so long."""
        if self.new_tokens == 0:
            self.first_token_ms = elapsed_ms
        else:
            self.decode_ms += elapsed_ms
        self.new_tokens += 1

    def line(self, load_ms: float | None = None) -> str:
        """All of it for people: `12 prompt tokens, first token after 35 ms, 64 tokens at 410.3 tok/s`."""
        parts = [] if load_ms is None else [f"loaded in {load_ms:.0f} ms"]
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        parts.append(f"{_count(self.prompt_tokens, 'prompt token')}{cached}")
        parts.append(f"first token after {self.first_token_ms:.0f} ms")
        rate = self.decode_tokens_per_s
        parts.append(_count(self.new_tokens, "token") + (f" at {rate:.1f} tok/s" if rate else ""))
        if self.finish_reason == "max_length":
            parts.append("ended because max_length is full")
        return ", ".join(parts)


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


class TextGenerator:
    """Texts from a bundle, one after another. The KV cache is kept while a prompt continues what it holds."""

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, options: GenerationOptions, guesser: Guesser | None = None
    ) -> None:
        self._runner = runner
        self._guesser = guesser
        self._tokens: Iterator[int] = iter(())
        self._tokenizer = tokenizer
        self._options = options
        self._sampler = Sampler(options.sampling)
        self._context: list[int] = []
        """Prompt and output of the latest text; the runner holds its beginning."""
        self._texts = 0

    def stream(self, prompt_ids: Sequence[int], options: GenerationOptions | None = None) -> TextStream:
        """Begin a text. An earlier stream of this generator that is read any further raises UsageError.

        Args:
            prompt_ids: the prompt.
            options: for this text alone, which then also begins a random sequence of its own.

        Raises:
            UsageError: the prompt is empty or too long.
        """
        sampler = self._sampler if options is None else Sampler(options.sampling)
        options = options or self._options
        entries: list[TokenLogprobs] = []
        if options.logprobs is not None:
            sampler = recording = RecordingSampler(sampler, options.logprobs)
            entries = recording.entries
        check_prompt(prompt_ids, self._runner.max_length)
        self._end()
        cached = self._reusable(prompt_ids)
        self._tokens = generate(
            self._runner,
            prompt_ids,
            sampler,
            max_new_tokens=options.max_new_tokens,
            eos_ids=options.eos_ids,
            cached=cached,
            guesser=self._guesser if options.logprobs is None else None,  # numbers are the same each time
        )
        self._begin(prompt_ids)
        statistics = Statistics(len(prompt_ids), cached)
        return TextStream(
            self._kept(self._tokens, self._texts), self._tokenizer.detokenizer(), options, statistics, entries
        )

    def forget(self) -> None:
        """End the latest text and take nothing in the KV cache for known: someone else uses the runner."""
        self._end()
        self._begin(())

    def _end(self) -> None:
        """The latest text is read no further; what was guessed for it is taken back."""
        if isinstance(self._tokens, Generator):
            self._tokens.close()

    def _begin(self, prompt_ids: Sequence[int]) -> None:
        self._context = list(prompt_ids)
        self._texts += 1

    def _reusable(self, prompt_ids: Sequence[int]) -> int:
        """Tokens in the cache if the prompt continues them, else 0: a runner takes nothing back."""
        held = self._context[: int(self._runner.row_lengths.sum())]  # one row, or none yet
        return len(held) if len(held) < len(prompt_ids) and list(prompt_ids[: len(held)]) == held else 0

    def _kept(self, tokens: Iterator[int], text: int) -> Iterator[int]:
        while True:
            if text != self._texts:
                raise UsageError("this text cannot go on: its generator was used for something else since")
            token = next(tokens, None)
            if token is None:
                return
            self._context.append(token)
            yield token


class TextStream(Iterator[str]):
    """The pieces of one text as they come, never empty; `text` and `statistics` grow with them."""

    def __init__(
        self,
        tokens: Iterator[int],
        detokenizer: Detokenizer,
        options: GenerationOptions,
        statistics: Statistics,
        entries: Sequence[TokenLogprobs] = (),
    ) -> None:
        self.statistics = statistics
        self._entries = entries
        self.text = ""
        self._options = options
        self._tokens = tokens
        self._detokenizer = detokenizer
        self._stop = StopStrings(options.stop)
        self._pieces = self._run()

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """One entry for each token so far, the one that ended the text included; none where nobody asked for them."""
        return tuple(self._entries[: self.statistics.new_tokens])  # the loop may be ahead of who reads the text

    def _run(self) -> Iterator[str]:
        reason: FinishReason = "max_length"
        for token in self._timed():
            if token in self._options.eos_ids:
                reason = "eos"
                break
            piece = self._detokenizer.push(token)
            if self._options.stop:
                piece = self._stop.push(piece, self._detokenizer.special_text(token), self._detokenizer.pending())
            if piece:
                yield piece
            if self._stop.stopped:
                break
        if piece := self._stop.push(self._detokenizer.flush()) + self._stop.flush():
            yield piece
        if self._stop.stopped:
            reason = "stop"
        elif reason != "eos" and self.statistics.new_tokens == self._options.max_new_tokens:
            reason = "max_new_tokens"
        self.statistics.finish_reason = reason

    def _timed(self) -> Iterator[int]:
        while True:
            start = perf_counter()
            token = next(self._tokens, None)
            if token is None:
                return
            self.statistics.add_token((perf_counter() - start) * 1000)
            yield token
