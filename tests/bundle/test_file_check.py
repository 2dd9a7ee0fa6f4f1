"""Files that are checked while their reader goes on, beside the check that goes file by file."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import shared_bundle

from doge_deploy.bundle import file_check, files
from doge_deploy.bundle.file_check import FileCheck
from doge_deploy.bundle.files import FileEntry, file_entries, file_problems
from doge_deploy.bundle.opening import load_manifest, open_bundle
from doge_deploy.errors import BrokenBundleError

SIZES = {"a": 0, "b": 10, "c": 5000, "d": 5001, "e": 40_000, "f": 40_000}

Damage = Callable[[Path], None]


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, dict[str, Damage]] = {
    "none": {},
    "small": {"b": flipped},
    "large": {"e": flipped},
    "missing": {"a": Path.unlink, "f": Path.unlink},
    "sizes": {"b": cut, "e": longer},
    "a folder": {"c": a_folder},
    "above the quick limit": {"f": flipped},
    "in another order": {"f": cut, "d": flipped, "b": flipped},
    "all": {"b": flipped, "c": flipped, "d": Path.unlink, "e": flipped, "f": flipped},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "files"
    path.mkdir()
    for place, (name, size) in enumerate(SIZES.items()):
        (path / name).write_bytes(bytes((place + index * 7) % 251 for index in range(size)))
    return path


@pytest.fixture(params=[0, 5000, 1 << 30], ids=["all later", "some later", "all at once"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(file_check, "AT_ONCE_BYTES", request.param)
    monkeypatch.setattr(file_check, "PIECE_BYTES", 4096)
    monkeypatch.setattr(files, "QUICK_LIMIT_BYTES", 30_000)
    monkeypatch.setattr(file_check, "QUICK_LIMIT_BYTES", 30_000)
    return int(request.param)


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_it_says_what_the_other_says(damage: str, quick: bool, at_once: int, folder: Path) -> None:
    entries = file_entries(folder)
    for name, change in DAMAGES[damage].items():
        change(folder / name)
    expected = list(file_problems(folder, entries, quick=quick))
    check = FileCheck(folder, entries, quick=quick)
    assert check.problems() == expected == check.problems()
    assert bool(expected) == (damage != "none" and not (quick and damage in ("large", "above the quick limit")))


def test_what_was_put_right_meanwhile_was_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_check, "AT_ONCE_BYTES", 0)
    entries = file_entries(folder)
    sound = (folder / "e").read_bytes()
    flipped(folder / "e")
    check = FileCheck(folder, entries, quick=False)
    assert check._large is not None
    check._large.result()
    (folder / "e").write_bytes(sound)
    assert check.problems() == ["e was altered (its sha256 is not the manifest's)"]


@pytest.mark.parametrize("name", ["b", "e"])
def test_a_file_that_cannot_be_read(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    original = files.sha256_file

    def failing(path: Path, *piece: int) -> str:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path, *piece)

    entries = file_entries(folder)
    flipped(folder / "c")
    monkeypatch.setattr(files, "sha256_file", failing)
    with pytest.raises(OSError) as expected:
        list(file_problems(folder, entries, quick=False))
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            FileCheck(folder, entries, quick=False).problems()
        assert str(caught.value) == str(expected.value)


def test_the_reader_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes begin only when the reader says so: one that waited for them would wait forever."""
    monkeypatch.setattr(file_check, "AT_ONCE_BYTES", 5000)
    original, go, hashed = file_check.hash_problem, threading.Event(), []

    def held(directory: Path, name: str, entry: FileEntry, *piece: int) -> Any:
        if entry["bytes"] > 5000:
            assert go.wait(60)
            assert threading.current_thread() is not threading.main_thread()
            hashed.append(name)
        return original(directory, name, entry, *piece)

    monkeypatch.setattr(file_check, "hash_problem", held)
    check = FileCheck(folder, file_entries(folder), quick=False)
    assert not hashed
    go.set()
    assert check.problems() == [] and hashed == ["d", "e", "f"]


class TestBundle:
    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(file_check, "AT_ONCE_BYTES", 0)
        return Path(shutil.copytree(shared_bundle("doge-tiny"), tmp_path / "bundle"))

    def test_a_sound_one(self, path: Path) -> None:
        bundle = open_bundle(path, wait=False)
        bundle.prove()
        bundle.prove()
        assert bundle == open_bundle(path)

    @pytest.mark.parametrize("change", [flipped, cut, longer, Path.unlink, a_folder])
    @pytest.mark.parametrize("check", ["quick", "full"])
    def test_each_file(self, path: Path, change: Damage, check: str) -> None:
        for name in load_manifest(path).files:
            aside = path.parent / "aside"
            shutil.copy2(path / name, aside)
            change(path / name)
            with pytest.raises(BrokenBundleError) as expected:
                open_bundle(path, check=check)
            bundle = open_bundle(path, check=check, wait=False)
            for _ in range(2):
                with pytest.raises(BrokenBundleError) as caught:
                    bundle.prove()
                assert str(caught.value) == str(expected.value) and name in str(caught.value)
            if (path / name).is_dir():
                (path / name).rmdir()
            shutil.move(aside, path / name)
        open_bundle(path, wait=False).prove()

    def test_damage_goes_before_what_else_is_raised(self, path: Path) -> None:
        with pytest.raises(LookupError), open_bundle(path, wait=False).damage_first():
            raise LookupError("a")
        flipped(path / "weights.safetensors")
        with (
            pytest.raises(BrokenBundleError, match=r"weights\.safetensors was altered"),
            open_bundle(path, wait=False).damage_first(),
        ):
            raise LookupError("a")
        with pytest.raises(KeyboardInterrupt), open_bundle(path, wait=False).damage_first():
            raise KeyboardInterrupt
