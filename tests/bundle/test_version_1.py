"""Bundles of format version 1 still open, generate and verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from doge_deploy.bundle.consistency import read_manifest
from doge_deploy.bundle.manifest import Lowered, Manifest
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.cli.main import run_command

OLD = Path(__file__).parent.parent / "golden" / "bundle-v1"


def document() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((OLD / "manifest.json").read_text(encoding="utf-8"))
    assert data["format_version"] == 1 and "ort" in data["layouts"]["static"]
    return data


def read(data: dict[str, Any]) -> Manifest:
    findings: list[str] = []
    manifest = read_manifest(data, findings)
    assert manifest is not None, findings
    return manifest


def test_it_opens() -> None:
    manifest = open_bundle(OLD).manifest
    lowered = manifest.layouts["static"].lowered
    assert list(lowered) == ["ort"] and lowered["ort"].file == "model.ort.onnx" and lowered["ort"].drops_keys
    assert manifest.layouts["growing"].lowered == {}
    assert (manifest.options.quantize, manifest.options.block_size, manifest.max_length) == ("int8", 128, 96)


def test_it_becomes_version_2_when_it_is_written(tmp_path: Path) -> None:
    path = Path(shutil.copytree(OLD, tmp_path / "bundle"))
    manifest = open_bundle(path).manifest
    write_manifest(path, manifest)
    data = json.loads((path / "manifest.json").read_text())
    assert data["format_version"] == 2 and "ort" not in data["layouts"]["static"]
    assert open_bundle(path).manifest == manifest


def test_what_was_no_choice_yet_has_the_value_that_it_had() -> None:
    data = document()
    for name in ("task", "quantize", "block_size", "symmetric"):
        del data["options"][name]
    del data["engines"]
    del data["layouts"]["static"]["ort"]["drops_keys"]
    manifest = read(data)
    assert (manifest.task, manifest.options.quantize, manifest.options.symmetric) == ("causal-lm", None, True)
    assert manifest.layouts["static"].lowered["ort"] == Lowered(
        "model.ort.onnx", manifest.layouts["static"].lowered["ort"].applied, {}, "1.32", False
    )


def test_a_layout_that_was_not_lowered() -> None:
    data = document()
    del data["layouts"]["growing"]["ort"]
    data["layouts"]["static"]["ort"] = None
    assert [layout.lowered for layout in read(data).layouts.values()] == [{}, {}]


@pytest.mark.parametrize("layout", ["static", "growing"])
def test_it_generates(layout: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(OLD), "--prompt", "The", "--greedy", "--max-new-tokens", "80", "--layout", layout]
    assert run_command([*command, "--quiet"]) == 0
    assert len(capfd.readouterr().out) > 20


def test_it_verifies() -> None:
    assert run_command(["verify", str(OLD), "--layout", "static", "--greedy-steps", "8"]) == 0
