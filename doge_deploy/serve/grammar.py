"""Structured output: a JSON schema, a regular expression, choices or a Lark grammar decide which tokens may come.

Reference: https://github.com/guidance-ai/llguidance (which does the work).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from doge_deploy.errors import BrokenBundleError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]

MAX_GRAMMAR_CHARACTERS = 64 * 1024
"""Of a schema or grammar as text: compiling takes time that grows with it."""

LEXER_FUEL = 200_000
"""Of llguidance's work; a fifth of its default, under which `(a{1000}){1000}` takes seconds for one token."""


class GrammarCompiler:
    """Compiles grammars for the tokenizer of one bundle; it can be used by several threads.

    Args:
        tokenizer_file: tokenizer.json of the bundle.
        vocab_size: V of the model's logits.
        eos_ids: tokens that end a text; they are allowed where the grammar is satisfied.

    Raises:
        MissingDependencyError: llguidance is not installed.
        BrokenBundleError: llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_ids: Collection[int]) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise MissingDependencyError(
                "structured output needs llguidance, which is not installed: pip install 'doge-deploy[serve]'"
            ) from None
        self._vocab_size = vocab_size
        try:
            self.tokenizer: LLTokenizer = LLTokenizer(
                tokenizer_file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=sorted(eos_ids) or None
            )
        except Exception as error:  # the library raises what its Rust code gives
            raise BrokenBundleError(
                f"{tokenizer_file} cannot be used for structured output: {_one_line(error)}"
            ) from error

    def compile(self, kind: Kind, source: str | Mapping[str, Any] | Sequence[str] | None = None) -> Grammar:
        """A grammar at its beginning.

        Args:
            kind: `json_object` (any JSON object; no source), `json_schema` (a schema as a mapping), `regex`, `choice`
                (a list of texts), or `grammar` (Lark).
            source: what the kind says.

        Raises:
            UsageError: it is not valid, too large, or cannot be enforced.
        """
        from llguidance import LLMatcher, LLParserLimits

        text = source if isinstance(source, str) else json.dumps(source)
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            raise UsageError(f"{kind}: {len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS} are compiled")
        try:
            if kind in ("json_object", "json_schema"):
                schema = '{"type": "object"}' if kind == "json_object" else text
                # as json.dumps writes it: where blanks are free, a small model may write nothing but blanks to the end
                grammar = LLMatcher.grammar_from_json_schema(
                    schema, defaults={"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
                )
            elif kind == "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            elif kind == "choice":
                grammar = LLMatcher.grammar_from_lark(_alternatives(source))
            else:
                grammar = LLMatcher.grammar_from_lark(text)
        except ValueError as error:
            raise UsageError(f"{kind}: {_one_line(error)}") from error
        limits = LLParserLimits(
            initial_lexer_fuel=LEXER_FUEL,
            step_lexer_fuel=LEXER_FUEL // 4,
            step_max_items=20_000,
            max_lexer_states=50_000,
            max_grammar_size=100_000,
            verbose_errors=False,
        )
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self.tokenizer, limits=limits)
        # A warning says that a part of the schema is not enforced: what was asked for would not be done.
        if failed or messages:
            raise UsageError(f"{kind}: {_one_line(messages[0])}")
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits)
        # The first tokens that are allowed, found out here: what takes long at the beginning of a text, or cannot be
        # followed at all, shows before the request has a slot. Copies know it already.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise UsageError(f"{kind}: {_one_line(matcher.get_error())}")
        return Grammar(matcher, self._vocab_size)


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
            raise UsageError(f"structured output failed: {_one_line(self._matcher.get_error())}")


def _alternatives(choices: object) -> str:
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices or not all(choices):
        raise ValueError("needs a list of texts, each of at least one character")
    return "start: " + " | ".join(json.dumps(str(choice), ensure_ascii=False) for choice in choices)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:500]
