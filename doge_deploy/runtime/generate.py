"""Text from a runner: the loop of prefill and decode steps, its options, stop strings and measurements.

One row at a time (batch 1). Axes: Q tokens of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Any, Literal

import numpy as np

from doge_deploy.errors import UsageError
from doge_deploy.runtime.base import FloatArray, Runner
from doge_deploy.runtime.sampling import Context, Sampler, SamplingOptions
from doge_deploy.runtime.tokenizer import Detokenizer, Tokenizer

DEFAULT_MAX_NEW_TOKENS = 100
"""Where the bundle names none: what the model cards of Doge recommend."""

FinishReason = Literal["eos", "stop", "max_new_tokens", "max_length"]

_SAMPLING_NAMES = tuple(spec.name for spec in fields(SamplingOptions))
ONLY_WHERE_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Names of `SamplingOptions` that mean nothing where the likeliest token is taken."""

_NOT_DONE_HERE: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
}
"""Settings of transformers' GenerationConfig that change a text and are not done here.

With each the values, beside null, under which it has no effect."""


@dataclass(frozen=True)
class GenerationOptions:
    """How a text is generated.

    Raises:
        UsageError: a value outside of what is legal.
    """

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    """At most so many tokens, the one that ends the text included."""
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end a text."""
    stop: tuple[str, ...] = ()
    """Texts that end a text; the output holds none of them."""

    def __post_init__(self) -> None:
        if not _is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens!r}: must be a whole number from 1 up")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop={list(self.stop)!r}: must be texts of at least one character")

    @classmethod
    def merged(cls, *layers: Mapping[str, Any]) -> GenerationOptions:
        """Options from several mappings in the names of generation_config.json; a later one wins.

        None means not set. What is set nowhere has transformers' default, except `max_new_tokens`. Without
        sampling, temperature, top-k, top-p and min-p have no meaning and are not looked at.

        Args:
            layers: looked at are the names of `SamplingOptions`, `max_new_tokens`, `eos_token_id` (an id or a list)
                and `stop_strings` (a text or a list).

        Raises:
            UsageError: a value is not legal.
        """
        values = {key: value for layer in layers for key, value in layer.items() if value is not None}
        sampling = {name: values[name] for name in _SAMPLING_NAMES if name in values}
        if not sampling.get("do_sample", False):
            for name in ONLY_WHERE_SAMPLING:
                sampling.pop(name, None)
        eos = _as_tuple(values.get("eos_token_id", ()))
        if not all(_is_whole(token) for token in eos):
            raise UsageError(f"eos_token_id={list(eos)!r}: must be a token id or a list of them")
        return cls(
            SamplingOptions(**sampling),
            values.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
            frozenset(eos),
            _as_tuple(values.get("stop_strings", ())),
        )


def settings_not_done(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a generation_config.json asks for that `generate` does not do, each as `name=value`."""
    return tuple(
        f"{name}={config[name]!r}"
        for name, without_effect in _NOT_DONE_HERE.items()
        if config.get(name) is not None and config[name] not in without_effect
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


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
    return _tokens(runner, Context(prompt_ids), sampler, max_new_tokens, eos_ids, prefill_chunk, cached)


def _tokens(
    runner: Runner,
    context: Context,
    sampler: Sampler,
    max_new_tokens: int,
    eos_ids: Collection[int],
    prefill_chunk: int | None,
    cached: int,
) -> Iterator[int]:
    """The loop of `generate`; `context` grows by every token."""
    if not cached:
        runner.reset()
    logits = _prefill(runner, context[cached:], prefill_chunk)
    for count in range(1, max_new_tokens + 1):
        token = sampler.pick(logits, context)
        context.append(token)
        yield token
        if token in eos_ids or count == max_new_tokens or len(context) > runner.max_length:
            return
        logits = _feed(runner, [token])


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
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.stopped = False
        """Whether one was found; nothing more comes out then."""

    def push(self, piece: str) -> str:
        """The text that is certain after `piece`."""
        if self.stopped:
            return ""
        text = self._held + piece
        starts = {stop: text.find(stop) for stop in self._stop}
        found = [(start + len(stop), start) for stop, start in starts.items() if start >= 0]
        if found:
            _, certain = min(found)
            self.stopped, self._held = True, ""
            return text[:certain]
        certain = len(text) - self._beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that one of the strings begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


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

    def __init__(self, runner: Runner, tokenizer: Tokenizer, options: GenerationOptions) -> None:
        self._runner = runner
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
        cached = self._reusable(prompt_ids)
        tokens = generate(
            self._runner,
            prompt_ids,
            sampler,
            max_new_tokens=options.max_new_tokens,
            eos_ids=options.eos_ids,
            cached=cached,
        )
        self._begin(prompt_ids)
        statistics = Statistics(len(prompt_ids), cached)
        return TextStream(self._kept(tokens, self._texts), self._tokenizer.detokenizer(), options, statistics)

    def forget(self) -> None:
        """End the latest text and take nothing in the KV cache for known: someone else uses the runner."""
        self._begin(())

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
    ) -> None:
        self.statistics = statistics
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

    def _run(self) -> Iterator[str]:
        reason: FinishReason = "max_length"
        for token in self._timed():
            if token in self._options.eos_ids:
                reason = "eos"
                break
            if piece := self._stop.push(self._detokenizer.push(token)):
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
