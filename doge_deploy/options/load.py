"""Options of a command from their sources: defaults, then a YAML file, then `--set`, then single values.

Each command's options are a model of their own, with a section of their own in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from doge_deploy.diagnostics import join_findings, suggest
from doge_deploy.errors import UsageError

_Options = TypeVar("_Options", bound=BaseModel)

_FILE_KEYS = ("name", "description", "sources", "device", "export", "build")
"""Top-level keys of a file in export_configs/."""


@dataclass(frozen=True)
class _Choice:
    """A value and the place that a user would mend: a file, a `--set`, an option."""

    value: Any
    source: str = ""
    """Empty for an argument of a call from Python, whose name says it all."""

    def blame(self, finding: str) -> str:
        """A finding about the value, with the place in front."""
        return f"{self.source}: {finding}" if self.source else finding


def load_options(
    kind: type[_Options], section: str, path: Path | None, overrides: Mapping[str, Any], assignments: Sequence[str]
) -> _Options:
    """Options of one command; later sources replace earlier ones key by key.

    Args:
        kind: the model of the options; the `description` of a field says what is legal.
        section: the key of the YAML file that holds them.
        path: a YAML file, or None.
        overrides: options given one by one on the command line; None or () stands for one that was not given.
        assignments: `key=value` strings of `--set`, the values in YAML.

    Raises:
        UsageError: a source cannot be read, or names unknown keys or illegal values: all of them in one line.
    """
    choices = _read_file(path, section) if path is not None else {}
    for assignment in assignments:
        key, value = _parse_assignment(assignment)
        choices[key] = _Choice(value, f"--set {assignment}")
    for key, value in overrides.items():
        if value is not None and value != ():
            choices[key] = _Choice(value, "--" + key.replace("_", "-"))
    return _validated(kind, choices)


def combine_options(kind: type[_Options], options: _Options | None, values: Mapping[str, Any]) -> _Options:
    """Options of a call from Python: an options object, values that replace some of its fields, or both.

    Args:
        kind: the model of the options.
        options: None stands for the defaults.
        values: by the names of the model's fields; None is a value like any other.

    Raises:
        UsageError: `options` is of another type, or names are unknown or values illegal: all of them in one line.
    """
    if options is None:
        options = kind()
    elif not isinstance(options, kind):
        raise UsageError(f"options={options!r}: must be {kind.__name__}")
    # only what was chosen: some checks ask whether a field was given at all
    fields = {name: getattr(options, name) for name in sorted(options.model_fields_set)}
    return _validated(kind, {key: _Choice(value) for key, value in {**fields, **values}.items()})


def _validated(kind: type[_Options], choices: Mapping[str, _Choice]) -> _Options:
    try:
        return kind(**{key: choice.value for key, choice in choices.items()})
    except ValidationError as error:
        raise UsageError(join_findings(_describe(error, choices, kind))) from None


def _describe(error: ValidationError, choices: Mapping[str, _Choice], kind: type[BaseModel]) -> list[str]:
    """One finding per key that pydantic refused, in our words."""
    findings = {}
    for detail in error.errors():
        key = str(detail["loc"][0])
        choice = choices[key]
        if detail["type"] == "extra_forbidden":
            findings[key] = choice.blame(_unknown("key", key, kind.model_fields))
        else:
            legal = kind.model_fields[key].description
            findings[key] = choice.blame(f"{key}={choice.value!r}: must be {legal}")
    return list(findings.values())


def _unknown(what: str, key: str, known: Iterable[str]) -> str:
    return f"unknown {what} {key!r}{suggest(key, known)}; known: {', '.join(known)}"


def _parse_assignment(assignment: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {assignment}: must have the form key=value")
    from doge_deploy.options.yaml_text import parse_yaml

    try:
        return key.strip(), parse_yaml(text)
    except ValueError:
        raise UsageError(f"--set {assignment}: the value {text!r} is not valid YAML") from None


def _read_file(path: Path, section: str) -> dict[str, _Choice]:
    """The options under one key of a YAML file."""
    options = read_document(path, section).get(section, {})
    if not isinstance(options, dict):
        raise UsageError(f"{path}: {section}={options!r}: must be a mapping of options")
    return {str(key): _Choice(value, str(path)) for key, value in options.items()}


def read_document(path: Path, section: str = "export") -> dict[str, Any]:
    """A file of export_configs/, its top-level keys checked.

    Args:
        path: the file.
        section: the key that was looked for, for the message about a file that is no mapping.

    Raises:
        UsageError: it cannot be read, is no mapping, or has unknown keys.
    """
    document = _read_yaml(path)
    if not isinstance(document, dict):
        raise UsageError(f"{path}: must hold a mapping with the key {section!r}, not {_kind(document)}")
    findings = [_unknown("key", str(key), _FILE_KEYS) for key in document if key not in _FILE_KEYS]
    if findings:
        raise UsageError(f"{path}: {join_findings(findings)}")
    return document


def _read_yaml(path: Path) -> Any:
    from doge_deploy.options.yaml_text import parse_yaml

    try:
        with path.open(encoding="utf-8") as file:
            return parse_yaml(file, unique_keys=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text: byte {error.start}") from None
    except ValueError as error:
        raise UsageError(f"{path}: is not valid YAML: {error}") from None


def _kind(document: Any) -> str:
    return "nothing" if document is None else f"a {type(document).__name__}"
