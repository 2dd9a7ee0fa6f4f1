"""Manifests of format version 1 in the form of version 2.

Version 1 named one backend, ONNX Runtime, in every layout, and early bundles lack options that came later.
"""

from __future__ import annotations

from typing import Any

_LATER_OPTIONS = {"task": "causal-lm", "quantize": None, "block_size": None, "symmetric": True}
"""What a bundle has that was exported before there was a choice."""


def to_version_2(data: dict[str, Any], findings: list[str]) -> dict[str, Any]:
    """The document in the new form. What does not look like version 1 is left for the schema to find.

    Args:
        data: the document.
        findings: takes a sentence for keys that version 1 did not have, but version 2 has.
    """
    result = {"engines": {}, **data, "format_version": 2}
    if isinstance(data.get("options"), dict):
        result["options"] = {**_LATER_OPTIONS, **data["options"]}
    if isinstance(data.get("layouts"), dict):
        result["layouts"] = {name: _layout(row) for name, row in data["layouts"].items()}
        for name, row in data["layouts"].items():
            if isinstance(row, dict) and "lowered" in row:
                findings.append(f"layouts.{name}.lowered: unknown key in format version 1, which has ort")
    return result


def _layout(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    result = {name: value for name, value in row.items() if name != "ort"}
    lowered = row.get("ort")
    result["lowered"] = {} if lowered is None else {"ort": lowered}
    return result
