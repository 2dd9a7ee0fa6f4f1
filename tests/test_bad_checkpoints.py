"""Every broken checkpoint is refused with exit code 3 and one line that names the cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_checkpoints import BROKEN, make_bases, make_broken

from doge_deploy.checkpoint import check_finite, open_checkpoint
from doge_deploy.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("sound"))


def refusal(path: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        check_finite(open_checkpoint(str(path)))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["dense", "moe", "equal-heads"])
def test_the_sound_ones_are_accepted(name: str, bases: dict[str, Path]) -> None:
    check_finite(open_checkpoint(str(bases[name])))


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(make_broken(name, bases, tmp_path / name))
    for words in BROKEN[name].words:
        assert words in message
    assert not list(tmp_path.rglob("loaded")), "code of the checkpoint was run"


def test_long_lists_are_cut(bases: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(make_broken("layers-too-many", bases, tmp_path / "broken"))
    assert "more" not in message
    from broken_checkpoints import config

    config(num_hidden_layers=4)(tmp_path / "broken")
    message = refusal(tmp_path / "broken")
    assert "30 missing" in message
    assert "; and 10 more" in message
