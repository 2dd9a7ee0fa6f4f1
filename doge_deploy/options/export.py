"""Choices of a user for an export: defaults, then a YAML file, then `--set`, then command-line options.

`load_options` does the same for the choices of other commands; each has a section of its own in the file.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from doge_deploy.diagnostics import join_findings, suggest
from doge_deploy.dtypes import ShortName
from doge_deploy.errors import UsageError

CacheLayout = Literal["static", "growing"]
Task = Literal["causal-lm", "sequence-classification", "features"]

_Options = TypeVar("_Options", bound=BaseModel)

_LAYOUT_ORDER = ("static", "growing")

_WEIGHT_FORMATS = "doge_deploy.graph.weight_formats"


def weight_format_names() -> tuple[str, ...]:
    """Names of the weight formats: the modules of their package that do not begin with an underscore.

    They are listed, not imported: what they do belongs to the graph, which options do not know.
    """
    spec = importlib.util.find_spec(_WEIGHT_FORMATS)
    assert spec is not None and spec.submodule_search_locations is not None
    found = (module.name for module in pkgutil.iter_modules(list(spec.submodule_search_locations)))
    return tuple(sorted(name for name in found if not name.startswith("_")))


_FILE_KEYS = ("name", "description", "sources", "device", "export", "build")
"""Top-level keys of a file in export_configs/."""


class ExportOptions(BaseModel):
    """What to export. The description of a field says what is legal, and is quoted where a value is not."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    task: Task = Field("causal-lm", description="one of causal-lm, sequence-classification, features")
    dtype: ShortName = Field("fp32", description="one of fp32, fp16, bf16")
    kv_cache: tuple[CacheLayout, ...] = Field(
        ("static",), min_length=1, description="static, growing or a list of both"
    )
    max_length: int | None = Field(
        None, ge=1, description="a whole number >= 1, or null for the checkpoint's own length"
    )
    routing: Literal["reference", "per-token"] = Field("reference", description="one of reference, per-token")
    logits: Literal["last", "all"] = Field("last", description="one of last, all")
    num_layers: int | None = Field(None, ge=1, description="a whole number >= 1, or null for all layers")
    quantize: str | None = Field(None, description=f"one of {', '.join(weight_format_names())}, or null")
    """The name of a weight format."""
    block_size: int | None = Field(None, ge=1, description="a whole number >= 1, or null for the weight format's own")
    """The format says which sizes it takes."""
    symmetric: bool = Field(True, description="true or false")

    @field_validator("quantize")
    @classmethod
    def _check_format(cls, value: str | None) -> str | None:
        if value is not None and value not in weight_format_names():
            raise ValueError("there is no such weight format")
        return value

    @field_validator("kv_cache", mode="before")
    @classmethod
    def _normalise_layouts(cls, value: Any) -> Any:
        """One name or any sequence of names becomes a tuple in the order of the graphs, each name once."""
        if isinstance(value, str):
            return (value,)
        if isinstance(value, (list, tuple)) and all(name in _LAYOUT_ORDER for name in value):
            return tuple(name for name in _LAYOUT_ORDER if name in value)
        return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class _Choice:
    """A value and the place that a user would mend: a file, a `--set`, an option."""

    value: Any
    source: str


def load_export_options(path: Path | None, overrides: Mapping[str, Any], assignments: Sequence[str]) -> ExportOptions:
    """The options of one export, from the section `export` of the file; see `load_options`."""
    return load_options(ExportOptions, "export", path, overrides, assignments)


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
            findings[key] = f"{choice.source}: {_unknown('key', key, kind.model_fields)}"
        else:
            legal = kind.model_fields[key].description
            findings[key] = f"{choice.source}: {key}={choice.value!r}: must be {legal}"
    return list(findings.values())


def _unknown(what: str, key: str, known: Iterable[str]) -> str:
    return f"unknown {what} {key!r}{suggest(key, known)}; known: {', '.join(known)}"


def _parse_assignment(assignment: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {assignment}: must have the form key=value")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError:
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
    document = _load_yaml(path)
    if not isinstance(document, dict):
        raise UsageError(f"{path}: must hold a mapping with the key {section!r}, not {_kind(document)}")
    findings = [_unknown("key", str(key), _FILE_KEYS) for key in document if key not in _FILE_KEYS]
    if findings:
        raise UsageError(f"{path}: {join_findings(findings)}")
    return document


def _kind(document: Any) -> str:
    return "nothing" if document is None else f"a {type(document).__name__}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _load_yaml(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, _UniqueKeyLoader)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text: byte {error.start}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
