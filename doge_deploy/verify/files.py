"""A report as files for machines: JSON with every number, JUnit for CI."""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from doge_deploy.errors import UsageError
from doge_deploy.graph.weight_formats import weight_formats
from doge_deploy.verify.parity import CaseResult
from doge_deploy.verify.report import Report
from doge_deploy.verify.tolerance import TOLERANCES


def report_json(report: Report) -> dict[str, Any]:
    """The report in plain values; infinite numbers become strings, as JSON has none."""
    return {
        "passed": report.passed,
        "reference": report.reference,
        "recording": report.recording,
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
    }


def _quality_limits() -> dict[str, Any]:
    """Of every weight format."""
    return {name: asdict(known.quality) for name, known in weight_formats().items()}


def _case_json(result: CaseResult) -> dict[str, Any]:
    quantities = {
        quantity.name: {
            **{key: _plain(value) for key, value in asdict(quantity.difference).items()},
            "allowed": {key: _plain(value) for key, value in asdict(quantity.limit).items()},
            "passed": quantity.passed,
        }
        for quantity in result.quantities
    }
    return {
        "case": result.case,
        "layout": result.layout,
        "passed": result.passed,
        "failures": result.failures,
        "quantities": quantities,
        "kl_divergence": _plain(result.kl),
        "top1": {key: _plain(value) for key, value in asdict(result.top1).items()},
        "selections": result.selected,
        "tied_rows": result.tied_rows,
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(report: Report, path: Path) -> None:
    """Raises UsageError where the file cannot be written."""
    _write(path, json.dumps(report_json(report), indent=2, allow_nan=False) + "\n")


def write_junit(report: Report, path: Path) -> None:
    """One test case per case and layout; unreachable ones are skipped. Raises UsageError where it cannot be written."""
    failed = len(report.failed_cases)
    suite = ET.Element(
        "testsuite",
        name="doge-deploy verify",
        tests=str(1 + len(report.results) + len(report.quality) + len(report.skipped)),
        failures=str(failed),
        skipped=str(len(report.skipped)),
    )
    _add_case(suite, "verify", "weights", report.weights.failures)
    for result in report.results:
        _add_case(suite, f"verify.{result.layout}", result.case, result.failures)
    for quality in report.quality:
        _add_case(suite, f"verify.{quality.layout}", "quality", quality.failures)
    for name, reason in report.skipped.items():
        ET.SubElement(ET.SubElement(suite, "testcase", classname="verify", name=name), "skipped", message=reason)
    ET.indent(suite)
    _write(path, ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n")


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


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.rename(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
