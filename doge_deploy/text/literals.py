"""Texts of special tokens that somebody typed, kept as text: a user must not be able to end a turn or begin another.

A chat template writes special tokens as text between what people said, and then all of it is encoded at once. So what
people said is marked before it is rendered, and only what the template itself wrote is taken for a special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING

from doge_deploy.errors import UsageError
from doge_deploy.text.backend import ids_of

if TYPE_CHECKING:
    import tokenizers

_PRIVATE_USE = range(0xE000, 0xF900)


class Literals:
    """The special tokens of one tokenizer.

    Args:
        backend: its copy is used, so that the original keeps its settings.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        import tokenizers

        added = backend.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items() if token.special and token.content}
        self._pattern = re.compile(_one_of(self._ids) if self._ids else r"(?!)")
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def found(self, messages: Iterable[Mapping[str, str]]) -> str | None:
        """A special token that somebody typed; None where there is none."""
        for message in messages:
            if match := self._pattern.search(message["content"]):
                return match[0]
        return None

    def mark(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[dict[str, str]]]:
        """A character that nobody used, and the messages with it inside every special token that somebody typed.

        Raises:
            UsageError: a special token is a single character, which cannot be marked.
        """
        used = {character for message in messages for value in message.values() for character in value}
        mark = next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)

        def marked(match: re.Match[str]) -> str:
            if len(match[0]) < 2:
                raise UsageError(f"the text holds {match[0]!r}, a special token of this model; leave it out")
            return match[0][0] + mark + match[0][1:]

        return mark, [{**message, "content": self._pattern.sub(marked, message["content"])} for message in messages]

    def ids(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered conversation: special tokens where the template wrote them, text where they are marked."""
        result: list[int] = []
        end = 0
        for match in self._pattern.finditer(text):
            result += self._piece(text[end : match.start()], mark)
            result.append(self._ids[match[0]])
            end = match.end()
        return result + self._piece(text[end:], mark)

    def _piece(self, text: str, mark: str) -> list[int]:
        plain = text.replace(mark, "")
        return ids_of(self._backend, plain, add_special_tokens=False) if plain else []


_DEPTH = 16
"""Groups within groups of a regular expression."""


def _one_of(texts: Iterable[str], depth: int = _DEPTH) -> str:
    """A regular expression that finds the longest of different `texts`. What they begin with stands there once, since
    there may be hundreds of them: other threads stand still while a text is searched.
    """
    tails: dict[str, list[str]] = {}
    longest_first = sorted(texts, key=len, reverse=True)
    if depth == 0:
        return f"(?:{'|'.join(map(re.escape, longest_first))})"
    for text in filter(None, longest_first):
        tails.setdefault(text[0], []).append(text[1:])
    branches = []
    for head, rests in tails.items():
        begin = head + commonprefix(rests)  # noqa: RUF071 (characters are meant)
        rests = [rest[len(begin) - 1 :] for rest in rests]
        branches.append(re.escape(begin) + (_one_of(rests, depth - 1) if any(rests) else ""))
    return f"(?:{'|'.join(branches)}){'' if longest_first[-1] else '?'}"
