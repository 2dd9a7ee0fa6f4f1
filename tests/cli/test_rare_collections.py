"""How often Python looks for unreachable objects while a command works, and afterwards."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from doge_deploy import api
from doge_deploy.cli.main import run_command
from doge_deploy.errors import UsageError


def test_rarely_during_an_export_and_as_before_behind_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def refused(*_: Any, **__: Any) -> None:
        seen.append(gc.get_threshold())
        raise UsageError("no")

    monkeypatch.setattr(api, "export", refused)
    before = gc.get_threshold()
    assert run_command(["export", "doge-tiny", "-o", str(tmp_path / "bundle")]) == 2
    assert seen == [(50_000, *before[1:])] and gc.get_threshold() == before
