"""How long a prompt, or a text that is embedded, may be."""

from __future__ import annotations

from doge_deploy.errors import UsageError


class TooLongError(UsageError):
    """A text has more tokens than the model takes at once."""


def check_length(tokens: int, most: int) -> None:
    """Raises TooLongError where `tokens` of a text are more than the `most` that a model takes."""
    if tokens > most:  # these words are known to clients that look for them
        raise TooLongError(f"{tokens} tokens; this model's maximum context length is {most} tokens")
