"""A jinja2 sandbox in which no template runs for ever or fills the memory.

Three limits, each with the message of a `TemplateLimit`:

- every turn of a loop, call and filter is a step, of which there are at most `MAX_STEPS`;
- a value that an operation, call, filter, block or list makes, and what the template writes, has at most `MAX_SIZE`
  characters and items if it was written out; what would be larger is refused before it is made;
- the thread may compute for at most `MAX_SECONDS`.

All of it happens in the thread of the caller. Loops are counted because a step is put into their bodies when the
template is compiled; `~` and the displays of lists become calls then; operators, calls, filters and blocks have hooks
in the sandbox. So a limit is noticed between two operations, never within one, and sizes bound how long one takes. The
time is that of the thread, not of a clock on the wall: a busy machine does not make a template fail.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

if TYPE_CHECKING:
    from jinja2.runtime import Context

MAX_STEPS = 1_000_000
"""Turns of loops, calls and filters of one rendering. A conversation of 1,000 messages takes some 10,000."""
MAX_SIZE = 1 << 24
"""Characters and items of one value, and of what a template writes."""
MAX_SECONDS = 5.0
"""Seconds that the thread may compute in one rendering."""
_MAX_BITS = 1 << 16
"""Of a whole number that a template may make."""


class TemplateLimit(TemplateError):
    """The template was stopped by a limit."""


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._steps = 0
        self._end = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TemplateLimit(f"it takes more than {MAX_STEPS} steps")
        # To ask for the time at every step would take longer than most steps do.
        if self._steps % 8 == 0 and time.thread_time() > self._end:
            raise TemplateLimit(f"it computes for more than {MAX_SECONDS:g} seconds")


def check_size(size: int, does: str = "makes") -> None:
    if size > MAX_SIZE:
        raise TemplateLimit(f"it {does} more than {MAX_SIZE} characters or items")


def _weight(value: object) -> int:
    """Characters and items of a value if it was written out.

    What is held twice counts twice, and is looked at once: a list that holds the same list twice, which holds the same
    list twice and so on, is found out in as many steps as it has levels.
    """
    known: dict[int, int] = {}

    def weigh(value: object) -> int:
        if isinstance(value, str | bytes | range):
            return len(value)
        if isinstance(value, Namespace):
            value = object.__getattribute__(value, "_Namespace__attrs")
        if not isinstance(value, list | tuple | dict | set | frozenset):
            return 1
        if id(value) not in known:
            known[id(value)] = 1  # of a value within itself
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known[id(value)] = len(inner) + sum(map(weigh, inner))
        return known[id(value)]

    return weigh(value)


def _checked(value: Any) -> Any:
    """A value that an operation made."""
    check_size(_weight(value))
    if isinstance(value, int):
        _check_bits(value.bit_length())
    return value


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise TemplateLimit(f"it makes whole numbers of more than {_MAX_BITS} bits")


def _number(values: Iterable[object]) -> int:
    """The largest whole number among arguments: a width or a count."""
    return max((value for value in values if isinstance(value, int)), default=0)


def _longest(values: Iterable[object]) -> int:
    return max((len(value) for value in values if isinstance(value, str | bytes)), default=0)


def _check_format(text: Any, values: Sequence[object]) -> None:
    """A text in the forms of `%` and `str.format`: widths and precisions, and values that are written repeatedly."""
    text = text if isinstance(text, str) else text.decode("latin-1")
    if re.search(r"\d{8}", text):
        raise TemplateLimit("it formats with a width of more than 7 digits")
    check_size(_number(values) if "*" in text or "{:{" in text.replace(" ", "") else 0)
    check_size(len(text) + (text.count("%") + text.count("{")) * max(map(_weight, values), default=0))


def _before_operator(operator: str, left: Any, right: Any) -> None:
    """What an operator would make, checked before it is made."""
    if operator == "+":
        if isinstance(left, str | bytes | list | tuple):
            check_size(_weight(left) + _weight(right))
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
                check_size(_weight(sequence) * count)
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str | bytes):
        _check_format(left, right if isinstance(right, tuple) else (right,))


def _before_method(text: str | bytes | int, name: str, arguments: Sequence[Any]) -> None:
    """What a method of a text or a number would make, checked before it is made."""
    number = _number(arguments)
    if name in ("center", "ljust", "rjust", "zfill", "to_bytes"):
        check_size(number)
    elif isinstance(text, int):
        return
    elif name == "expandtabs":
        check_size(len(text) * number)
    elif name == "replace" and len(arguments) > 1:
        _check_replace(text, arguments[0], arguments[1])
    elif name == "translate":
        table = arguments[0] if arguments else {}
        check_size(len(text) * max(1, _longest(table.values()) if isinstance(table, dict) else 1))


def _before_filter(name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """What a filter of jinja2 would make, checked before it is made; `arguments` without what it is not given to."""
    if not arguments:
        return
    value, rest = arguments[0], (*arguments[1:], *options.values())
    number = _number(rest)
    if name in ("center", "batch", "slice"):
        check_size(number)
    elif name in ("indent", "wordwrap") and isinstance(value, str):
        added = max(number if name == "indent" else 1, _longest(rest))
        check_size(len(value) + (value.count("\n") + 1 if name == "indent" else len(value)) * added)
    elif name == "format":
        _check_format(str(value), rest)
    elif name == "replace" and len(arguments) > 2:
        _check_replace(str(value), str(arguments[1]), str(arguments[2]))
    elif name == "tojson":
        check_size(number)
    elif name in ("string", "pprint", "sum"):
        check_size(_weight(value))


def _check_replace(text: Any, old: Any, new: Any) -> None:
    """How often `old` is in `text`, by the length that `new` is longer."""
    if isinstance(old, str | bytes) and isinstance(new, str | bytes):
        check_size(len(text) + text.count(old) * max(len(new) - len(old), 0))


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The immutable sandbox with the three limits. Filters are wrapped by `limit_filters` once all are there."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        self._running = threading.local()
        super().__init__(**options)
        del self.globals["lipsum"]  # random text, as much as a template asks for

    def limited(self) -> _Running:
        """A context in which this thread has a new budget."""
        return _Running(self._running)

    def count_step(self) -> None:
        """One step of the budget; templates call it too."""
        budget: Budget = self._running.budget
        budget.step()

    def limit_filters(self) -> None:
        """Give every filter that is there now the limits."""
        self.filters = {name: self._limited_filter(name, function) for name, function in self.filters.items()}

    def _limited_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # Some are given the context, the environment or its evaluation before the value.
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)  # its attributes too: one of them says what it is given
        def limited(*arguments: Any, **options: Any) -> Any:
            self.count_step()
            if name in ("join", "sum") and len(arguments) > skipped:
                between = [*arguments[skipped + 1 :], *options.values()]
                listed = _measured(arguments[skipped], max(map(_weight, between), default=0))
                arguments = (*arguments[:skipped], listed, *arguments[skipped + 1 :])
            _before_filter(name, arguments[skipped:], options)
            return _checked(function(*arguments, **options))

        return limited

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template with a step in every loop, and with calls where jinja2 has no hook."""
        tree = super()._parse(source, name, filename)
        repeated: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *tree.find_all(nodes.For),
            *tree.find_all(nodes.Macro),
            *tree.find_all(nodes.CallBlock),
        ]
        for loop in repeated:
            step = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(step).set_lineno(loop.lineno))
        _put_calls(tree)
        return tree

    def joined(self, *parts: object) -> str:
        """What `~` makes."""
        check_size(sum(map(_weight, parts)))
        return "".join(map(str, parts))

    def display(self, value: Any) -> Any:
        """A list, tuple or dict that the template wrote."""
        return _checked(value)

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of a block or macro."""
        pieces = list(pieces)
        check_size(sum(map(len, pieces)))
        return "".join(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _before_operator(operator, left, right)
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if __obj == __self.count_step:
            return __obj()
        __self.count_step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes | int):
            if name == "join" and args:
                args = (_measured(args[0], len(owner) if isinstance(owner, str | bytes) else 0), *args[1:])
            _before_method(owner, name, (*args, *kwargs.values()))
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's own `str.format`, with limits."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, (*args, *kwargs.values()))
            text: str = wrapped(*args, **kwargs)
            return text

        return limited


class _Running:
    """Gives a thread a budget, and takes it away."""

    def __init__(self, place: threading.local) -> None:
        self._place = place

    def __enter__(self) -> Budget:
        self._place.budget = budget = Budget()
        return budget

    def __exit__(self, *error: object) -> None:
        del self._place.budget


def _put_calls(node: nodes.Node) -> None:
    """Calls of `joined` and `display` for every `~`, list, tuple and dict under `node`."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, list):
            setattr(node, name, [_as_call(item) for item in value])
        else:
            setattr(node, name, _as_call(value))


def _as_call(value: Any) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _put_calls(value)
    line = value.lineno
    if isinstance(value, nodes.Concat):
        joined = nodes.EnvironmentAttribute("joined", lineno=line)
        return nodes.Call(joined, value.nodes, [], None, None, lineno=line)
    written = isinstance(value, nodes.List | nodes.Dict) or (isinstance(value, nodes.Tuple) and value.ctx == "load")
    if written and not _is_constant(value):
        display = nodes.EnvironmentAttribute("display", lineno=line)
        return nodes.Call(display, [value], [], None, None, lineno=line)
    return value


def _is_constant(display: nodes.Node) -> bool:
    return display.find(nodes.Name) is None and display.find(nodes.Call) is None


def _measured(items: Any, between: int) -> list[Any] | str | bytes:
    """The items of a join or a sum, whose result is measured before it is made."""
    listed = items if isinstance(items, str | bytes) else list(items)
    # A sum of lists copies what it has at every item.
    times = len(listed) if any(isinstance(item, list | tuple) for item in listed) else 1
    check_size(_weight(listed) * times + between * len(listed))
    return listed
