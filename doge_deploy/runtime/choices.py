"""What a caller may choose for one text, in the names of transformers' generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from doge_deploy.diagnostics import suggest
from doge_deploy.errors import UsageError
from doge_deploy.options.generation import ONLY_WHERE_SAMPLING


class TextChoices(TypedDict, total=False):
    """Choices as keyword arguments; one that is missing or None comes from the bundle's generation_config.json."""

    do_sample: bool | None
    """Draw each token; where False take the likeliest. Implied by temperature, top_k, top_p and min_p."""
    temperature: float | None
    """Finite, above 0; above 1 evens out the odds."""
    top_k: int | None
    """Draw among that many likeliest tokens; 0 is no limit."""
    top_p: float | None
    """0 to 1: draw among the likeliest tokens that together reach this probability."""
    repetition_penalty: float | None
    """Above 0; above 1 makes tokens that were there less likely."""
    seed: int | None
    """From 0 up: the same seed draws the same text, on the same machine."""
    min_p: float | None
    """0 to 1: draw among the tokens that are at least this likely in proportion to the likeliest one."""
    presence_penalty: float | None
    """-2 to 2: taken off the logit of every token that the output holds."""
    frequency_penalty: float | None
    """-2 to 2: taken off the logit of a token for each time that the output holds it."""
    logit_bias: Mapping[int, float] | None
    """Token id to a number, -100 to 100, that is added to its logit."""
    max_new_tokens: int | None
    """From 1 up: end after so many tokens."""
    eos_token_id: int | Sequence[int] | None
    """Tokens that end the text."""
    stop_strings: str | Sequence[str] | None
    """The text ends before the first of them."""
    logprobs: int | None
    """0 and up: report the logarithm of each token's probability, and those of so many of the likeliest tokens."""


def without_effect(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Choices that would do nothing, since no token is to be drawn; with their values."""
    if choices.get("do_sample") is not False:
        return {}
    return {name: choices[name] for name in ONLY_WHERE_SAMPLING if choices.get(name) is not None}


def resolve_choices(choices: Mapping[str, Any]) -> dict[str, Any]:
    """The choices that were made, and what they imply.

    Raises:
        UsageError: a name is unknown, or two choices contradict each other.
    """
    known = tuple(TextChoices.__annotations__)
    for name in choices:
        if name not in known:
            raise UsageError(f"unknown option {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    if idle := without_effect(choices):
        named = ", ".join(f"{name}={value!r}" for name, value in idle.items())
        raise UsageError(f"do_sample=False draws no token, so {named} would do nothing: drop one or the other")
    made = {name: value for name, value in choices.items() if value is not None}
    if any(name in made for name in ONLY_WHERE_SAMPLING):
        made["do_sample"] = True
    return made
