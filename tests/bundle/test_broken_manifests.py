"""Every broken manifest is refused with exit code 3 and one line that names the culprit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from broken_manifests import BROKEN
from bundles import make_bundle
from engine_stand_ins import write_engine

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import BrokenBundleError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both layouts, one of them lowered, and an engine."""
    path = tmp_path_factory.mktemp("sound") / "bundle"
    make_bundle("doge-tiny", path, kv_cache=("static", "growing"), logits="all", num_layers=1, max_length=96)
    write_engine(path)
    return path


def test_the_sound_one_opens(sound: Path) -> None:
    bundle = open_bundle(sound)
    assert bundle.engine() and bundle.layout("static").lowered["ort"].file


def test_there_are_enough_of_them() -> None:
    assert len(BROKEN) >= 100


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(sound, tmp_path / "bundle"))
    BROKEN[name].damage(path)
    with pytest.raises(BrokenBundleError) as caught:
        open_bundle(path, check="quick")
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 3000
    for words in BROKEN[name].words:
        assert words in message
    assert run_command(["inspect", str(path)]) == 3
    said = capsys.readouterr()
    assert not said.out and said.err == f"doge-deploy: error: {message}\n"


def test_everything_wrong_is_said_at_once(sound: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sound, tmp_path / "bundle"))
    for name in ("option-dtype", "fact-text", "layout-note"):
        BROKEN[name].damage(path)
    with pytest.raises(BrokenBundleError) as caught:
        open_bundle(path)
    for name in ("option-dtype", "fact-text", "layout-note"):
        assert BROKEN[name].words[0] in str(caught.value)
