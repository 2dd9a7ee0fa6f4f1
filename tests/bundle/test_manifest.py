"""Opening bundles: every altered or missing file is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.signature import make_signature
from doge_deploy.cli.main import run_command
from doge_deploy.errors import BrokenBundleError, UsageError


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit of a weight": (lambda b: flip_a_bit(b / "weights.safetensors"), "weights.safetensors was altered"),
    "bit of a graph": (lambda b: flip_a_bit(b / "model.onnx"), "model.onnx was altered"),
    "cut weights": (lambda b: cut(b / "weights.safetensors"), r"weights.safetensors was altered \(\d+ bytes, manifest"),
    "missing tokenizer": (lambda b: (b / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "has no manifest.json"),
    "manifest not JSON": (lambda b: (b / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
    "manifest of nothing": (
        lambda b: (b / "manifest.json").write_text("{}"),
        "format_version is missing",
    ),
    "manifest a list": (
        lambda b: (b / "manifest.json").write_text("[]"),
        "the document=.*must be an object",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BREAKS.values(), ids=BREAKS.keys())
def test_a_damaged_bundle_is_refused(
    copy: Path, damage: Callable[[Path], None], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    with pytest.raises(BrokenBundleError, match=message):
        open_bundle(copy)
    for command in (["inspect", str(copy)], ["verify", str(copy)], ["generate", str(copy), "--prompt", "x"]):
        assert run_command(command) == 3, command
        error = capfd.readouterr().err
        assert error.startswith("doge-deploy: error: ")
        assert error.count("\n") == 1


def test_a_newer_format_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    with pytest.raises(BrokenBundleError, match="format_version=3: must be 1 or 2"):
        open_bundle(copy)


def test_what_is_not_a_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a directory"):
        open_bundle(tmp_path / "nowhere")


def test_unknown_layout_names_those_there_are(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="has no 'paged' layout; it holds: static, growing"):
        open_bundle(tiny_bundle).layout("paged")


def test_inspect_shows_people_and_machines_the_same(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", str(tiny_bundle)]) == 0
    text = capfd.readouterr().out
    assert "past_key_values.{i}.score" in text
    assert "every sha256 as in the manifest" in text
    assert run_command(["inspect", str(tiny_bundle), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == json.loads((tiny_bundle / "manifest.json").read_text())


def test_signature_survives_json(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    for name, layout in manifest.layouts.items():
        made = make_signature(manifest.facts, name, dtype="float32", max_length=manifest.max_length, last_logits=False)
        assert layout.signature == made
