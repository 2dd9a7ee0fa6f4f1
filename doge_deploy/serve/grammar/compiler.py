"""Grammars for one tokenizer, and which tokens of its model's logits they allow."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from doge_deploy.errors import UsageError
from doge_deploy.serve.grammar.matchers import Kind, Source, new_matcher, one_line, read_tokenizer, source_text

if TYPE_CHECKING:
    from llguidance import LLMatcher


class GrammarCompiler:
    """Compiles grammars for the tokenizer of one bundle; it can be used by several threads.

    What it is given is compiled at once in this process, whatever that takes: there are grammars of 1 kB that take
    hours, and some that end the process. `GrammarDesk` is for those that anybody may send.

    Args:
        tokenizer_file, vocab_size, eos_ids: see `matchers.read_tokenizer`, also for what is raised.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._vocab_size = vocab_size
        self.tokenizer = read_tokenizer(tokenizer_file, vocab_size, eos_ids)

    def compile(self, kind: Kind, source: Source = None) -> Grammar:
        """A grammar at its beginning.

        Raises:
            UsageError: it is not valid, too large, or cannot be enforced. The message does not name it.
        """
        return Grammar(new_matcher(self.tokenizer, kind, source_text(source)), self._vocab_size)


class Grammar:
    """Which tokens may come next in one text."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> Grammar:
        """Another text under the same grammar, at the same place."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size)

    def allow(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """`logits` `[V]` with -inf at tokens that may not come; a new array.

        Raises:
            UsageError: the grammar has become too complex to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        allowed = np.unpackbits(bits, bitorder="little", count=self._vocab_size).astype(bool)
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """`token` was chosen.

        Raises:
            UsageError: the grammar does not allow it.
        """
        self._matcher.consume_token(token)
        self._require_sound()

    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"structured output failed: {one_line(self._matcher.get_error())}")
