"""Every broken checkpoint is refused with exit code 3 and one line that names the cause."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from broken_checkpoints import BROKEN, config, make_bases, make_broken

from doge_deploy.checkpoint import check_finite, open_checkpoint
from doge_deploy.checkpoint.legacy import EARLY, rename_config
from doge_deploy.cli.main import run_command
from doge_deploy.config.keys import INERT_DOGE_KEYS, LEGACY_KEYS, REFUSED_KEYS, STANDARD_KEYS, USED_KEYS
from doge_deploy.config.model import DogeFacts
from doge_deploy.config.revisions import REVISIONS
from doge_deploy.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("sound"))


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `export` says: one line, with exit code 3 and nothing left behind."""
    output = path.parent / "bundles" / "bundle"
    code = run_command(["export", str(path), "-o", str(output)])
    said = capsys.readouterr()
    assert code == 3
    assert not said.out
    (line,) = said.err.splitlines()
    assert line.startswith("doge-deploy: error: ")
    assert len(line) < 2500
    assert not output.parent.exists()
    return line


@pytest.mark.parametrize("name", ["dense", "moe", "equal-heads"])
def test_the_sound_ones_are_accepted(name: str, bases: dict[str, Path]) -> None:
    check_finite(open_checkpoint(str(bases[name])))


@pytest.mark.parametrize("name", BROKEN)
def test_broken(
    name: str,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(make_broken(name, bases, tmp_path / name), capsys)
    for words in BROKEN[name].words:
        assert words in message
    assert not list(tmp_path.rglob("loaded")), "code of the checkpoint was run"


def test_long_lists_are_cut(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "more" not in refusal(make_broken("layers-too-many", bases, tmp_path / "broken"), capsys)
    config(num_hidden_layers=4)(tmp_path / "broken")
    message = refusal(tmp_path / "broken", capsys)
    assert "30 missing" in message
    assert "; and 10 more" in message


KEYS = sorted(USED_KEYS | INERT_DOGE_KEYS | STANDARD_KEYS | LEGACY_KEYS | set(REFUSED_KEYS))
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 1.5, -0.0, math.nan, math.inf, 10**40, "", "x", "\x00\n", "a" * 5000),
    *([], [1], [None], [[]], {}, {"a": 1}, {"rope_type": []}, {"rope_type": {}}, {"rope_type": "yarn", "factor": "x"}),
]


@pytest.mark.parametrize("key", KEYS)
def test_no_value_of_any_key_makes_a_traceback(key: str) -> None:
    sound = {"model_type": "doge", "hidden_size": 32, "num_attention_heads": 4, "keep_window_size": 8}
    for value in JUNK:
        document = {**sound, key: value}
        try:
            DogeFacts.from_config(document)
        except UnsupportedModelError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
        for revision in EARLY:
            try:
                DogeFacts.from_config(rename_config(document, REVISIONS[revision], "config.json"))
            except UnsupportedModelError as error:
                assert "\n" not in str(error)
