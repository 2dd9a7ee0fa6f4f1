"""A bundle as the cache of the Hugging Face hub keeps it: every file is a link to a blob beside the snapshots."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bundles import shared_bundle

from doge_deploy.bundle.files import WEIGHTS_FILE, sha256_file
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import BrokenBundleError, UnsupportedModelError
from doge_deploy.runtime.ort import open_runner


@pytest.fixture(scope="module")
def bundle() -> Path:
    return shared_bundle("doge-tiny", num_layers=1, max_length=48)


@pytest.fixture
def snapshot(bundle: Path, tmp_path: Path) -> Path:
    """`snapshots/0123/model.onnx -> ../../blobs/<hash>`"""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots/0123"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for file in bundle.iterdir():
        blob = blobs / sha256_file(file)
        shutil.copy(file, blob)
        (folder / file.name).symlink_to(f"../../blobs/{blob.name}")
    return folder


def test_it_generates_what_the_bundle_generates(
    bundle: Path, snapshot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime takes external data through a link where it lies beside the graph's own file."""
    found = []
    for path in (bundle, snapshot):
        assert run_command(["generate", str(path), "--prompt", "The", "--greedy", "--max-new-tokens", "6"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] and len(found[0]) > 1


def test_what_onnx_runtime_itself_refuses(
    bundle: Path, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that are linked to another folder than the graph's, and links for a graph that is no file.

    So `verify` cannot look into the selections of a snapshot. A release that takes them makes this test and a sentence
    of docs/bundle-format.md superfluous.
    """
    alone = Path(shutil.copytree(bundle, tmp_path / "alone"))
    shutil.move(alone / WEIGHTS_FILE, tmp_path / WEIGHTS_FILE)
    (alone / WEIGHTS_FILE).symlink_to(tmp_path / WEIGHTS_FILE)
    assert run_command(["generate", str(alone), "--prompt", "The"]) == 3
    message = capsys.readouterr().err
    assert "External data path escapes model directory" in message and message.count("\n") == 1
    with pytest.raises(UnsupportedModelError, match="External data path escapes model directory"):
        open_runner(open_bundle(snapshot), model=(snapshot / "model.onnx").read_bytes())


@pytest.mark.parametrize("name", ["model.onnx", WEIGHTS_FILE])
def test_another_blob_is_refused(name: str, snapshot: Path) -> None:
    blob = (snapshot / name).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(BrokenBundleError, match=f"{name} was altered"):
        open_bundle(snapshot)


def test_a_blob_that_is_gone_is_told(snapshot: Path) -> None:
    (snapshot / WEIGHTS_FILE).resolve().unlink()
    with pytest.raises(BrokenBundleError, match=f"{WEIGHTS_FILE} is missing"):
        open_bundle(snapshot)
