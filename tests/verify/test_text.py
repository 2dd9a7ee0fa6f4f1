"""The text of `verify`: through the bundle's tokenizer as `generate` reads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from doge_deploy.bundle.files import file_entries
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.cli.main import run_command
from doge_deploy.runtime.tokenizer import Tokenizer
from doge_deploy.verify.texts import TEXT, ids_of


def with_tokenizer(bundle: Path, target: Path, text: str) -> Bundle:
    """A copy of a bundle with another tokenizer.json, its hash in the manifest."""
    path = Path(shutil.copytree(bundle, target))
    (path / "tokenizer.json").write_text(text, encoding="utf-8")
    write_manifest(path, replace(open_bundle(bundle).manifest, files=file_entries(path)))
    return open_bundle(path)


def test_a_tokenizer_that_truncates_does_not_shorten_the_text(tiny_bundle: Path, tmp_path: Path) -> None:
    document = json.loads((tiny_bundle / "tokenizer.json").read_text(encoding="utf-8"))
    document["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = None
    bundle = with_tokenizer(tiny_bundle, tmp_path / "truncating", json.dumps(document))
    ids = ids_of(bundle)
    assert len(ids) > 16
    assert ids.tolist() == ids_of(open_bundle(tiny_bundle)).tolist()
    assert ids.tolist() == Tokenizer.from_directory(tiny_bundle).encode(TEXT)


@pytest.mark.parametrize("text", ["", "{}", "no JSON", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_one_line(
    text: str, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = with_tokenizer(tiny_bundle, tmp_path / "broken", text)
    assert run_command(["verify", str(bundle.path), "--greedy-steps", "1"]) == 3
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "tokenizer.json is not a tokenizer" in error
