"""A JSON value as an object of a dataclass: what the annotations say is checked, and everything wrong is told at once.

It understands what a manifest is made of: dataclasses, TypedDict, `Mapping[str, X]`, `tuple[X, ...]`, unions,
`Literal`, str, int, float, bool, None, `Any`, and `Annotated[X, Check(...)]`.
Why not a library: docs/decisions/0025-manifest-schema.md.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from doge_deploy.diagnostics import suggest


@dataclass(frozen=True)
class Check:
    """What a value must be beside its type."""

    legal: str
    """It must be ..."""
    holds: Callable[[Any], bool]


ILLEGAL: Any = object()
"""Stands for a value that was found wrong."""


def typed(kind: Any, value: Any, where: str, findings: list[str]) -> Any:
    """`value` as a `kind`, or `ILLEGAL`.

    Args:
        kind: a type of those that this module understands.
        value: what `json.loads` gave.
        where: what the value is called in a finding: `layouts.static.file`.
        findings: takes a sentence for each thing that is wrong: its name, its value, and what would be legal.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, check = parts
        inner: list[str] = []
        result = typed(base, value, where, inner)
        if inner and not inner[0].startswith(f"{where}="):  # it is wrong inside
            findings += inner
        elif inner or not check.holds(result):
            findings.append(must_be(where, value, check.legal))
            return ILLEGAL
        return result
    if origin in (Union, types.UnionType):
        return _union(parts, value, where, findings)
    if origin is tuple:
        return _tuple(parts[0], value, where, findings)
    if origin is not None and origin is not Literal:
        return _mapping(parts[1], value, where, findings)
    if is_dataclass(kind) or is_typeddict(kind):
        return _record(kind, value, where, findings)
    if not _fits(kind, value):
        findings.append(must_be(where, value, _legal(kind)))
        return ILLEGAL
    return float(value) if kind is float else value


def must_be(where: str, value: Any, legal: str) -> str:
    """A finding."""
    text = repr(value)
    text = text if len(text) <= 100 else f"{text[:80]}...{text[-15:]}"
    return f"{where}={text}: must be {legal}"


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a kind that has no parts; true is no number, and 1 is no flag."""
    if kind is Any:
        return True
    if kind is None or kind is types.NoneType:
        return value is None
    if get_origin(kind) is Literal:
        return any(value == legal and type(value) is type(legal) for legal in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}


def _legal(kind: Any) -> str:
    """What a value of this kind is, in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return str(parts[1].legal)
    if origin is Literal:
        words = [str(part) for part in parts]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if origin in (Union, types.UnionType):
        return " or ".join(_legal(part) for part in parts)
    if origin is tuple:
        return "a list"
    return _WORDS.get(kind, "an object")


def _union(parts: tuple[Any, ...], value: Any, where: str, findings: list[str]) -> Any:
    """The first part that the value fits; what is wrong inside of the one that it resembles is told."""
    for part in parts:
        inner: list[str] = []
        result = typed(part, value, where, inner)
        if not inner:
            return result
        if isinstance(value, (dict, list)) and any(not finding.startswith(f"{where}=") for finding in inner):
            findings += inner
            return ILLEGAL
    findings.append(must_be(where, value, _legal(Union[parts])))  # noqa: UP007 (made of a tuple)
    return ILLEGAL


def _tuple(kind: Any, value: Any, where: str, findings: list[str]) -> Any:
    if not isinstance(value, list):
        findings.append(must_be(where, value, "a list"))
        return ILLEGAL
    return tuple(typed(kind, item, f"{where}[{index}]", findings) for index, item in enumerate(value))


def _mapping(kind: Any, value: Any, where: str, findings: list[str]) -> Any:
    if not isinstance(value, dict):
        findings.append(must_be(where, value, "an object"))
        return ILLEGAL
    return {key: typed(kind, item, f"{where}.{key}" if where else key, findings) for key, item in value.items()}


def _record(kind: Any, value: Any, where: str, findings: list[str]) -> Any:
    """A dataclass, or the dict of a TypedDict. Fields with a default may be left out."""
    if not isinstance(value, dict):
        findings.append(must_be(where or "the document", value, "an object"))
        return ILLEGAL
    hints, optional = _keys(kind)
    path = f"{where}." if where else ""
    before = len(findings)
    for key in value:
        if key not in hints:
            findings.append(f"{path}{key}: unknown key{suggest(key, hints)}; known: {', '.join(hints)}")
    found = {}
    for key, hint in hints.items():
        if key in value:
            found[key] = typed(hint, value[key], path + key, findings)
        elif key not in optional:
            findings.append(f"{path}{key} is missing: must be {_legal(hint)}")
    return kind(**found) if len(findings) == before else ILLEGAL


@cache
def _keys(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of the keys that a record has, and which keys may be left out; a manifest has one kind many times."""
    hints = get_type_hints(kind, include_extras=True)
    optional = {key for key, hint in hints.items() if get_origin(hint) is NotRequired}
    hints = {key: get_args(hint)[0] if key in optional else hint for key, hint in hints.items()}
    if is_dataclass(kind):
        optional = {f.name for f in fields(kind) if not (f.default is MISSING and f.default_factory is MISSING)}
    return hints, frozenset(optional)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of `json.loads`: of two equal keys the last one would win without a word.

    Raises:
        ValueError: a key stands twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice")
        found[key] = value
    return found


def no_constant(name: str) -> Mapping[str, Any]:
    """`parse_constant` of `json.loads`: NaN and infinities are no JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is no JSON number")
