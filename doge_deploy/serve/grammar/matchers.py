"""From a schema, a regular expression, choices or a Lark grammar to a matcher of llguidance.

The process that tries grammars imports this: nothing here may need NumPy or the rest of the server.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from doge_deploy.errors import BrokenBundleError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
"""`json_object`: any JSON object; `choice`: one of some texts; `grammar`: Lark."""

Source = str | Mapping[str, Any] | Sequence[str] | None
"""What a kind says: nothing, a schema, an expression, texts, or a grammar. A schema and texts may be JSON already."""

MAX_GRAMMAR_CHARACTERS = 64 * 1024
"""Of a schema or grammar as text: compiling takes time that grows with it."""

LEXER_FUEL = 200_000
"""Of llguidance's work; a fifth of its default, under which `(a{1000}){1000}` takes seconds for one token."""


def read_tokenizer(file: Path, vocab_size: int, eos_ids: Collection[int]) -> LLTokenizer:
    """llguidance's own form of a tokenizer.

    Args:
        file: tokenizer.json of a bundle.
        vocab_size: V of the model's logits.
        eos_ids: tokens that end a text; they are allowed where a grammar is satisfied.

    Raises:
        MissingDependencyError: llguidance is not installed.
        BrokenBundleError: it cannot read the tokenizer.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise MissingDependencyError(
            "structured output needs llguidance, which is not installed: pip install 'doge-deploy[serve]'"
        ) from None
    try:
        return LLTokenizer(file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=sorted(eos_ids) or None)
    except Exception as error:  # the library raises what its Rust code gives
        raise BrokenBundleError(f"{file} cannot be used for structured output: {one_line(error)}") from error


def source_text(source: Source) -> str:
    """The source as one text, by which it is measured and remembered.

    Raises:
        UsageError: it is too large.
    """
    try:
        text = source if isinstance(source, str) else json.dumps(source)
    except RecursionError:
        raise UsageError("it is nested too deeply") from None
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise UsageError(f"{len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS} are compiled")
    return text


def new_matcher(tokenizer: LLTokenizer, kind: Kind, text: str) -> LLMatcher:
    """A matcher at its beginning, whose first allowed tokens are known.

    Args:
        tokenizer: of the model.
        kind: what the text is.
        text: of `source_text`.

    Raises:
        UsageError: it is not valid, or cannot be enforced. The message does not name it.
    """
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = _grammar(kind, text)
    except UnicodeEncodeError:
        raise UsageError("it holds half of a surrogate pair, which is no text") from None
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    limits = LLParserLimits(
        initial_lexer_fuel=LEXER_FUEL,
        step_lexer_fuel=LEXER_FUEL // 4,
        step_max_items=20_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer, limits=limits)
    # A warning says that a part of the schema is not enforced: what was asked for would not be done.
    if failed or messages:
        raise UsageError(_in_our_words(one_line(messages[0])))
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    # The first tokens that are allowed, found out here: what takes long at the beginning of a text, or cannot be
    # followed at all, shows before the request has a slot. Copies know it already.
    matcher.compute_bitmask()
    if matcher.is_error():
        raise UsageError(one_line(matcher.get_error()))
    return matcher


def _grammar(kind: Kind, text: str) -> str:
    """The grammar as llguidance takes it; raises ValueError."""
    from llguidance import LLMatcher

    if kind in ("json_object", "json_schema"):
        schema = '{"type": "object"}' if kind == "json_object" else text
        # as json.dumps writes it: where blanks are free, a small model may write nothing but blanks to the end
        return LLMatcher.grammar_from_json_schema(
            schema, defaults={"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
        )
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_lark(_alternatives(json.loads(text)) if kind == "choice" else text)


def _alternatives(choices: object) -> str:
    if not isinstance(choices, list) or not choices or not all(choices):
        raise ValueError("needs a list of texts, each of at least one character")
    # one terminal: of rules, llguidance follows at most 2,000 side by side
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(str(choice), ensure_ascii=False) for choice in choices)


def _in_our_words(message: str) -> str:
    """Without options of llguidance that nobody can set here."""
    if "coerce_one_of" in message:
        return "oneOf is supported only where its cases cannot overlap; use anyOf"
    return message


def one_line(message: object) -> str:
    """A message of the library, cut where it is long."""
    return " ".join(str(message).split())[:500]
