"""How a text is generated: the options of `generate`, and what a generation_config.json asks for.

Names and defaults are those of transformers' GenerationConfig.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from doge_deploy.errors import BrokenBundleError, UsageError

GENERATION_CONFIG = "generation_config.json"

DEFAULT_MAX_NEW_TOKENS = 100
"""Where the bundle names none: what the model cards of Doge recommend."""

_FLOAT32 = (2.0**-149, (2 - 2.0**-23) * 2.0**127)
"""The smallest number of float32 above 0, and the largest."""


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen. The defaults are those of transformers' `generate`.

    Raises:
        UsageError: a value outside of what is legal.
    """

    do_sample: bool = False
    """Draw from the distribution; where False the likeliest token is taken: only the penalty matters then."""
    temperature: float = 1.0
    """Logits are divided by it; finite, above 0."""
    top_k: int = 50
    """Draw among this many of the likeliest tokens; 0 turns the limit off."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens that reaches this probability; 1 turns the limit off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that the prompt or the output already holds less likely; 1 turns it off."""
    seed: int | None = None
    """Of the random numbers; a fresh one each time where None."""
    min_p: float = 0.0
    """Draw among the tokens that are at least this likely in proportion to the likeliest one; 0 turns the limit off."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the output (not the prompt) holds; below 0 makes them likelier."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time that the output (not the prompt) holds it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to a number that is added to its logit."""

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise UsageError(f"do_sample={self.do_sample!r}: must be true or false")
        if not _is_positive(self.temperature):
            raise UsageError(
                f"temperature={self.temperature!r}: must be a finite number above 0"
                " (for the likeliest token use --greedy)"
            )
        if not _is_count(self.top_k):
            raise UsageError(f"top_k={self.top_k!r}: must be a whole number from 0 (no limit) up")
        if not (_is_number(self.top_p) and 0 <= self.top_p <= 1):
            raise UsageError(f"top_p={self.top_p!r}: must be a number from 0 to 1 (no limit)")
        if not _is_positive(self.repetition_penalty):
            raise UsageError(
                f"repetition_penalty={self.repetition_penalty!r}: must be a number above 0 (1: no penalty)"
            )
        if not _FLOAT32[0] <= self.repetition_penalty <= _FLOAT32[1]:
            raise UsageError(
                f"repetition_penalty={self.repetition_penalty!r}: logits are float32, in which that is "
                f"{'infinite' if self.repetition_penalty > 1 else 0}; must be 1.5e-45 to 3.4e+38 (1: no penalty)"
            )
        if self.seed is not None and not _is_count(self.seed):
            raise UsageError(f"seed={self.seed!r}: must be a whole number from 0 up")
        if not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise UsageError(f"min_p={self.min_p!r}: must be a number from 0 (no limit) to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not (_is_number(value) and -2 <= value <= 2):
                raise UsageError(f"{name}={value!r}: must be a number from -2 to 2 (0: no penalty)")
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(f"logit_bias={self.logit_bias!r}: must be a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not _is_count(token):
                raise UsageError(f"logit_bias: {token!r} is not a token id, a whole number from 0 up")
            if not (_is_number(bias) and -100 <= bias <= 100):
                raise UsageError(f"logit_bias: {bias!r} for token {token}: must be a number from -100 to 100")

    @property
    def changes_logits(self) -> bool:
        """Whether the likeliest token may be another than that of the logits as they come."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or bool(self.logit_bias)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: float) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_count(value: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_SAMPLING_NAMES = tuple(spec.name for spec in fields(SamplingOptions))
ONLY_WHERE_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Names of `SamplingOptions` that mean nothing where the likeliest token is taken."""

_WHOLE = ("top_k", "seed", "max_new_tokens", "eos_token_id", "logprobs")

_NOT_OF_A_FILE = ("seed", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs")
"""What transformers' GenerationConfig does not know: there such keys of a file do nothing, and so they do here."""

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
    logprobs: int | None = None
    """Report the logarithm of each token's probability, and those of so many of the likeliest; None: report nothing."""

    def __post_init__(self) -> None:
        if not _is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens!r}: must be a whole number from 1 up")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop={list(self.stop)!r}: must be texts of at least one character")
        if self.logprobs is not None and not _is_count(self.logprobs):
            raise UsageError(f"logprobs={self.logprobs!r}: must be a whole number from 0 (that of each token alone) up")

    @classmethod
    def merged(cls, *layers: Mapping[str, Any]) -> GenerationOptions:
        """Options from several mappings in the names of generation_config.json; a later one wins.

        None means not set. What is set nowhere has transformers' default, except `max_new_tokens`. Without
        sampling, temperature, top-k, top-p and min-p have no meaning and are not looked at. A whole number may be
        written as 50.0.

        Args:
            layers: looked at are the names of `SamplingOptions`, `max_new_tokens`, `eos_token_id` (an id or a list),
                `stop_strings` (a text or a list) and `logprobs`.

        Raises:
            UsageError: a value is not legal.
        """
        values = {key: value for layer in layers for key, value in layer.items() if value is not None}
        values |= {name: _whole(values[name]) for name in _WHOLE if name in values}
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
            values.get("logprobs"),
        )

    @classmethod
    def with_file(
        cls,
        config: Mapping[str, Any],
        asked: Mapping[str, Any],
        *,
        eos_ids: Collection[int],
        source: object,
        vocab_size: int,
    ) -> GenerationOptions:
        """Options of a bundle: what was asked for, then its generation_config.json, then defaults.

        Args:
            config: generation_config.json; keys that transformers does not read there are not read here.
            asked: under the names of `merged`; None means not asked for.
            eos_ids: what ends a text where neither says so.
            source: the file, for messages.
            vocab_size: how many tokens the model knows.

        Raises:
            UsageError: a value that was asked for is not legal.
            BrokenBundleError: a value of the file is not legal, and none was asked for in its place.
        """
        given = {key: value for key, value in asked.items() if value is not None}
        used = {key: value for key, value in config.items() if key not in given and key not in _NOT_OF_A_FILE}
        for problem in _problems(used, given.get("do_sample", config.get("do_sample"))):
            raise BrokenBundleError(f"{source}: {problem}; give another value, or mend the checkpoint's file")
        options = cls.merged({"eos_token_id": list(eos_ids)}, used, given)
        if unknown := [token for token in options.sampling.logit_bias if token >= vocab_size]:
            raise UsageError(f"logit_bias: token {unknown[0]} is not in the model's vocabulary of {vocab_size}")
        return options


def illegal_settings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What is not legal in a generation_config.json, each as a sentence that begins with `name=value`."""
    return tuple(_problems(config, config.get("do_sample")))


def _problems(config: Mapping[str, Any], do_sample: object) -> Iterator[str]:
    for name in (*_SAMPLING_NAMES, "max_new_tokens", "eos_token_id", "stop_strings"):
        if config.get(name) is None or name in _NOT_OF_A_FILE:
            continue
        try:
            GenerationOptions.merged({"do_sample": do_sample is True}, {name: config[name]})
        except UsageError as error:
            yield str(error)


def settings_not_done(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a generation_config.json asks for that `generate` does not do, each as `name=value`."""
    return tuple(
        f"{name}={config[name]!r}"
        for name, without_effect in _NOT_DONE_HERE.items()
        if config.get(name) is not None and config[name] not in without_effect
    )


def _whole(value: Any) -> Any:
    """A number without a fraction as a whole number; a list likewise."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
