"""A report as files for machines: JSON with every number, JUnit for CI."""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from doge_deploy.errors import UsageError
from doge_deploy.graph.weight_formats import weight_formats
from doge_deploy.verify.baseline import Comparison
from doge_deploy.verify.parity import CaseResult
from doge_deploy.verify.report import Report
from doge_deploy.verify.tolerance import TOLERANCES

FORMAT_VERSION = 1
"""Of `report_json`: raised when a reader of the last one would go wrong."""


def report_json(report: Report) -> dict[str, Any]:
    """The report in plain values; infinite numbers become strings, as JSON has none. `json_schema.py` describes it."""
    found: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "passed": report.passed,
        "failed_cases": report.failed_cases,
        "reference": report.reference,
        "recording": report.recording,
        "bundle": str(report.bundle),
        "bundle_sha256": report.bundle_sha256,
        "checkpoint": report.checkpoint,
        "task": report.task,
        "dtype": report.dtype,
        "routing": report.routing,
        "graphs": report.graphs,
        "weights": asdict(report.weights),
        "cases": [_case_json(result) for result in report.results],
        "quality": [{**asdict(result), "passed": result.passed} for result in report.quality],
        "skipped": report.skipped,
        "reference_itself": asdict(report.reference_itself) if report.reference_itself else None,
        "quality_limits": _quality_limits() if report.quality else {},
        "tolerances": {name: asdict(row) for name, row in TOLERANCES.items()},
        "baseline": comparison_json(report.baseline) if report.baseline else None,
        "localized": report.localized,
        "environment": asdict(report.environment) if report.environment else None,
        "command": report.command,
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def _quality_limits() -> dict[str, Any]:
    """Of every weight format."""
    return {name: asdict(known.quality) for name, known in weight_formats().items()}


def _case_json(result: CaseResult) -> dict[str, Any]:
    quantities = {
        quantity.name: {
            **asdict(quantity.difference),
            "allowed": asdict(quantity.limit),
            "load": quantity.load,
            "passed": quantity.passed,
        }
        for quantity in result.quantities
    }
    return {
        "case": result.case,
        "layout": result.layout,
        "passed": result.passed,
        "failures": result.failures,
        "load": result.load,
        "quantities": quantities,
        "kl_divergence": result.kl,
        "top1": asdict(result.top1),
        "selections": result.selected,
        "tied_rows": result.tied_rows,
        "positions": asdict(result.positions) if result.positions else None,
    }


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """How the report stands to its baseline."""
    return {**asdict(comparison), "passed": comparison.passed}


def _plain(value: Any) -> Any:
    """`value` without what JSON does not know: infinite numbers become strings, tuples lists."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(report: Report, path: Path) -> None:
    """Raises UsageError where the file cannot be written."""
    write_text(path, json.dumps(report_json(report), indent=2, allow_nan=False) + "\n")


def write_junit(report: Report, path: Path) -> None:
    """One test case per case and layout; unreachable ones are skipped. Raises UsageError where it cannot be written."""
    drifts = report.baseline.drifts if report.baseline else ()
    failed = len(report.failed_cases) + bool(drifts)
    suite = ET.Element(
        "testsuite",
        name="doge-deploy verify",
        tests=str(1 + len(report.results) + len(report.quality) + len(report.skipped) + bool(report.baseline)),
        failures=str(failed),
        skipped=str(len(report.skipped)),
    )
    _add_case(suite, "verify", "weights", report.weights.failures)
    for result in report.results:
        _add_case(suite, f"verify.{result.layout}", result.case, result.failures)
    for quality in report.quality:
        _add_case(suite, f"verify.{quality.layout}", "quality", quality.failures)
    if report.baseline is not None:
        _add_case(suite, "verify", "baseline", [str(drift) for drift in drifts])
    for name, reason in report.skipped.items():
        ET.SubElement(ET.SubElement(suite, "testcase", classname="verify", name=name), "skipped", message=reason)
    ET.indent(suite)
    write_text(path, ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n")


def _add_case(suite: ET.Element, group: str, name: str, failures: Sequence[str]) -> None:
    case = ET.SubElement(suite, "testcase", classname=group, name=name)
    if failures:
        ET.SubElement(case, "failure", message=failures[0]).text = "\n".join(failures)


def check_writable(path: Path) -> None:
    """Raises UsageError where a report could not be written: told before the work rather than after it."""
    if path.is_dir():
        raise UsageError(f"{path} cannot be written: it is a directory")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: {path.parent} is not a directory that you may write to")


def write_text(path: Path, text: str) -> None:
    """There whole or not at all. Raises UsageError where the file cannot be written."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.rename(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
