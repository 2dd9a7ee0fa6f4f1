"""A report as a file for machines."""

from __future__ import annotations

import json
import os
from pathlib import Path

from doge_deploy.bench.report import Report, to_json
from doge_deploy.errors import UsageError


def check_writable(path: Path) -> None:
    """Raises UsageError where a file could not be written: told before the work rather than after it."""
    if path.is_dir():
        raise UsageError(f"{path} cannot be written: it is a directory")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: {path.parent} is not a directory that you may write to")


def write_json(report: Report, path: Path) -> None:
    """Every time and every figure of a report, written aside and renamed.

    Raises:
        UsageError: `path` cannot be written.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(json.dumps(to_json(report)) + "\n", encoding="utf-8")
        aside.rename(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
