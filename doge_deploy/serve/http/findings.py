"""What is wrong with a field, in the words of JSON: pydantic finds it, and its own sentences speak of Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

_RULE = "rule_between_fields"

_LONGEST_VALUE = 40
"""Characters of a value that is quoted."""

_KINDS: Mapping[type, str] = {str: "a text", list: "a list", dict: "an object"}


def spelled(value: object) -> str:
    """A value as JSON writes it; what is long or has parts is named by its kind."""
    kind = _KINDS.get(type(value))
    if isinstance(value, list | dict) or (isinstance(value, str) and len(value) > _LONGEST_VALUE):
        return str(kind)
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_VALUE else "a longer number"


def rule(field: str, said: str) -> PydanticCustomError:
    """An error of a model's validator about how fields belong together.

    Args:
        field: the one that is named, below the model.
        said: what holds, without that name in front.
    """
    return PydanticCustomError(_RULE, "{said}", {"field": field, "said": said})


def kind_error(legal: str, value: object) -> ValueError:
    """An error of a field's validator: a value of a wrong kind."""
    return ValueError(f"must be {legal}; not {spelled(value)}")


def place(finding: Mapping[str, Any]) -> list[str]:
    """The names and numbers under which a client finds the field."""
    parts = [str(part) for part in finding["loc"] if part not in ("body", "query", "path", "str")]
    return [*parts, finding["ctx"]["field"]] if finding["type"] == _RULE else parts


def told(finding: Mapping[str, Any]) -> str:
    """What is legal, and what came where that is short enough to be said."""
    words = _WORDS.get(finding["type"])
    if words is None:
        return str(finding["msg"]).removeprefix("Value error, ")
    said = words if isinstance(words, str) else words(finding.get("ctx", {}))
    return f"{said}; not {spelled(finding['input'])}" if finding["type"] in _WITH_VALUE else said


def _at_least(context: Mapping[str, Any]) -> str:
    least = context["min_length"]
    return "must not be empty" if least == 1 else f"must have at least {least} entries"


_Words = Mapping[str, str | Callable[[Mapping[str, Any]], str]]

_WITH_VALUE: _Words = {
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "literal_error": lambda context: f"must be {context['expected']}",
    "greater_than_equal": lambda context: f"must be at least {context['ge']:g}",
    "greater_than": lambda context: f"must be above {context['gt']:g}",
    "less_than_equal": lambda context: f"must be at most {context['le']:g}",
    "less_than": lambda context: f"must be below {context['lt']:g}",
}

_WORDS: _Words = {
    **_WITH_VALUE,
    "missing": "must be given",
    "string_too_short": _at_least,
    "too_short": _at_least,
    "string_too_long": lambda context: f"must have at most {context['max_length']} characters",
    "too_long": lambda context: f"must have at most {context['max_length']} entries",
}
"""By pydantic's type of a finding: what is legal, as a text or made of the finding's context."""
