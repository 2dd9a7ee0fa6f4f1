"""The JSON schema of `verify --json`, made of the dataclasses of a report.

python -m doge_deploy.verify.json_schema          # prints it; docs/verify-report.schema.json is its output
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from doge_deploy.graph.weight_formats import Quality
from doge_deploy.verify.baseline import Comparison
from doge_deploy.verify.compare import Difference, Top1
from doge_deploy.verify.environment import Environment
from doge_deploy.verify.files import FORMAT_VERSION
from doge_deploy.verify.oracle import SelfDifference, WeightsResult
from doge_deploy.verify.positions import Positions
from doge_deploy.verify.quality import QualityResult
from doge_deploy.verify.tolerance import AllowedDifference, Tolerance

NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
"""JSON has no infinite numbers: they are strings."""

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: NUMBER,
    type(None): {"type": "null"},
}


def report_schema() -> dict[str, Any]:
    """The schema of what `files.report_json` gives, draft 2020-12."""
    text, flag, count = _PLAIN[str], _PLAIN[bool], _PLAIN[int]
    texts = {"type": "array", "items": text}
    quantity = _record(
        Difference,
        allowed=_of(AllowedDifference),
        load=_said(NUMBER, "Share of the tolerance that is used, 1 being all."),
        passed=flag,
    )
    case = _object(
        case=text,
        layout=text,
        passed=flag,
        failures=texts,
        load=_said(NUMBER, "Of the tensor that uses most of its tolerance."),
        quantities=_map(quantity),
        kl_divergence=NUMBER,
        top1=_of(Top1),
        selections={"enum": ["", "exact", "certificate"]},
        tied_rows=count,
        positions=_or_null(_of(Positions)),
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Report of doge-deploy verify --json",
        **_object(
            format_version={"const": FORMAT_VERSION},
            passed=_said(flag, "The exit code is 0 where it is true, and else 1."),
            failed_cases=texts,
            reference=text,
            recording=_said(_or_null(text), "What took the place of the reference."),
            bundle=_said(text, "Where the judged bundle was."),
            bundle_sha256=_said(text, "Of its manifest, which holds the hashes of all its files."),
            checkpoint=text,
            task=text,
            dtype=text,
            routing=_or_null(text),
            graphs=_said(_map(text), "Per layout what was run."),
            weights=_of(WeightsResult),
            cases={"type": "array", "items": case},
            quality={"type": "array", "items": _record(QualityResult, passed=flag)},
            skipped=_said(_map(text), "Cases that could not be run or judged, each with the reason."),
            reference_itself=_or_null(_of(SelfDifference)),
            quality_limits=_map(_of(Quality)),
            tolerances=_map(_of(Tolerance)),
            baseline=_or_null(_record(Comparison, passed=flag)),
            localized=_said(texts, "What the localiser says, a line each."),
            environment=_or_null(_of(Environment)),
            command=text,
        ),
    }


def _of(kind: Any) -> dict[str, Any]:
    """The schema of a type: dataclasses, lists, tuples, mappings, unions and plain values."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    if dataclasses.is_dataclass(kind):
        return _record(kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(part) for part in parts]}
    if origin in (list, tuple):
        return {"type": "array", "items": _of(parts[0])}
    if origin in (dict, Mapping):
        return _map(_of(parts[1]))
    raise TypeError(f"{kind!r} has no schema")


def _record(kind: Any, **more: dict[str, Any]) -> dict[str, Any]:
    """A dataclass: every field is there, and none else."""
    hints = get_type_hints(kind)
    return _object(**{field.name: _of(hints[field.name]) for field in dataclasses.fields(kind)}, **more)


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _map(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _said(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {**schema, "description": description}


def text() -> str:
    """As it is in the file."""
    return json.dumps(report_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
