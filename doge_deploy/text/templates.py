"""Chat templates: what transformers offers to them, in a sandbox with limits.

A template comes with a checkpoint, so it is not to be trusted: it reaches nothing but the values passed to it, changes
none of them, and is stopped where it takes too long or makes too much (see template_limits.py).

Reference: transformers/utils/chat_template_utils.py, whose names and helpers templates rely on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.utils import Namespace

from doge_deploy.text.template_limits import LimitedEnvironment, TemplateLimit, check_size

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from jinja2.runtime import Macro

__all__ = ["ChatTemplate", "TemplateError", "TemplateLimit", "TemplateRefusal"]


class TemplateRefusal(TemplateError):
    """The template called `raise_exception`: these messages are not what the model was trained on."""


class ChatTemplate:
    """A compiled template. Any number of threads may render it at once."""

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateError where `source` is not a template."""
        self._environment = _environment()
        with self._environment.limited():
            self._template = self._environment.from_string(source)

    def render(
        self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str], *, add_generation_prompt: bool
    ) -> str:
        """The conversation as the model is to see it.

        Raises:
            TemplateRefusal: the template refuses these messages.
            TemplateLimit: it was stopped by a limit.
            Exception: whatever the template's own code runs into.
        """
        # As in transformers, a key whose value is none is not there. Templates ask whether tools and documents are
        # none, which what is undefined is not.
        values = {
            **special_tokens,
            "messages": [_message(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces, length = [], 0
        with self._environment.limited() as budget:
            for piece in self._template.generate(values):
                budget.step()
                length += len(piece)
                check_size(length, "writes")
                pieces.append(piece)
        return "".join(pieces)


_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message's reasoning is passed; templates read the first, some the second."""


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of its own for the template, with the names that templates read."""
    known = {key: value for key, value in message.items() if value is not None}
    reasoning = next((known[name] for name in _REASONING if name in known), None)
    return known if reasoning is None else {"thinking": reasoning, **known, "reasoning_content": reasoning}


def _environment() -> LimitedEnvironment:
    """What transformers offers to templates."""
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.limit_filters()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here they are as all others."""

    tags = {"generation"}  # noqa: RUF012 (an attribute of the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call, as in transformers: what is set within is not known after it.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        text: str = caller()
        return text


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name, as in jinja2
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"{name!r}: a name in a namespace must not begin with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it; jinja2's own filter escapes what is special in HTML."""
    pieces, length = [], 0
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for piece in encoder.iterencode(value):
        length += len(piece)
        check_size(length)
        pieces.append(piece)
    return "".join(pieces)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
