"""How long a prompt, or a text that is embedded, may be."""

from __future__ import annotations

import math

from doge_deploy.errors import UsageError


class TooLongError(UsageError):
    """A text has more tokens than the model takes at once."""


def check_length(tokens: int, most: int) -> None:
    """Raises TooLongError where `tokens` of a text are more than the `most` that a model takes."""
    if tokens > most:
        raise _too_long(f"{tokens} tokens", most)


def check_characters(characters: int, longest: int, most: int) -> None:
    """The same for a text that is not encoded yet, where a token stands for `longest` characters at most."""
    fewest = math.ceil(characters / longest)
    if fewest > most:
        raise _too_long(f"{characters} characters, which are {fewest} tokens or more", most)


def _too_long(what: str, most: int) -> TooLongError:
    # these words are known to clients that look for them
    return TooLongError(f"{what}; this model's maximum context length is {most} tokens")
