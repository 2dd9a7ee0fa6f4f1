"""A disk that fails at any one call of an export or a build: afterwards there is the old bundle or the new one, whole.

`python -m pytest tests/faults` with the marker `sweep` tries every call; without it every nineteenth.
"""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing_filesystem import Commands, Ended, commands, snapshot

from doge_deploy.bundle.opening import open_bundle

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs Linux and gcc, which builds the filesystem"
)

FAULTS = {
    "disk full": {"error": errno.ENOSPC, "for_good": True},
    "one call fails": {"error": errno.EIO, "for_good": False},
}

EVERY = [pytest.param(1, marks=pytest.mark.sweep, id="every call"), pytest.param(19, id="every nineteenth call")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def doge(tmp_path_factory: pytest.TempPathFactory, work: Path) -> Iterator[Commands]:
    with commands(tmp_path_factory.mktemp("harness"), work) as run:
        yield run


def check_end(end: Ended, what: str) -> None:
    assert end.code not in (1, 70), f"{what}: exit {end.code}: {end.said}"
    assert "Traceback" not in end.said and "Exception ignored" not in end.said, f"{what}: {end.said}"
    if end.code:
        assert end.code in (2, 4), f"{what}: exit {end.code}: {end.said}"
        assert "cannot be written: " in end.said, f"{what}: {end.said}"
        lines = [line for line in end.said.splitlines() if line.startswith("doge-deploy: error: ")]
        assert len(lines) == 1, f"{what}: {end.said}"


EXPORT = ("export", "doge-tiny", "--num-layers", 1, "--kv-cache", "static", "--kv-cache", "growing", "-o")


@pytest.mark.parametrize("step", EVERY)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("there", [False, True], ids=["new place", "replacement"])
def test_export(doge: Commands, work: Path, tmp_path: Path, there: bool, fault: str, step: int) -> None:
    folder = work / "export"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    place, force = folder / "b", ["--force"] if there else []
    doge.run("trace", *EXPORT, folder / "new")
    whole = snapshot(folder / "new")
    shutil.rmtree(folder / "new")
    if there:
        assert doge.run(*EXPORT, place, "--logits", "all").code == 0
        shutil.copytree(place, tmp_path / "old")
    old = snapshot(place) if there else {}
    plain = doge.run(*EXPORT, place, *force)
    assert plain.code == 0 and snapshot(place) == whole and old != whole
    tried = 0
    for at in range(1, plain.calls + 1, step):
        shutil.rmtree(place)
        if there:
            shutil.copytree(tmp_path / "old", place)
        end = doge.run(*EXPORT, place, *force, at=at, **FAULTS[fault])
        what = f"call {at} of {plain.calls}, {end.call}"
        tried += 1
        assert end.failed and folder.is_dir(), what
        check_end(end, what)
        assert sorted(path.name for path in folder.iterdir()) in ([["b"]] if there else [[], ["b"]]), what
        now = snapshot(place) if place.exists() else {}
        assert now == whole if end.code == 0 else now in (old, whole), what
        if not place.exists():
            place.mkdir()
    print(f"export, {fault}, {'replacement' if there else 'new place'}: {tried} of {plain.calls} calls")


BUILD = ("build", "--force")


@pytest.mark.tensorrt
@pytest.mark.parametrize("step", EVERY)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("there", [False, True], ids=["new engine", "replacement"])
def test_build(doge: Commands, work: Path, tmp_path: Path, there: bool, fault: str, step: int) -> None:
    folder = work / "build"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    place = folder / "b"
    assert doge.run("export", "doge-tiny", "--num-layers", 1, "--max-length", 32, "-o", place).code == 0
    if there:
        assert doge.run(*BUILD, place, "--sequence-length", 4).code == 0
    shutil.copytree(place, tmp_path / "old")
    old, held = snapshot(place), open_bundle(place).manifest.engines
    plain = doge.run(*BUILD, place)
    assert plain.code == 0, plain.said
    new = open_bundle(place).manifest.engines
    tried = 0
    for at in range(1, plain.calls + 1, step):
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "old", place)
        end = doge.run(*BUILD, place, at=at, **FAULTS[fault])
        what = f"call {at} of {plain.calls}, {end.call}"
        tried += 1
        check_end(end, what)
        assert [path.name for path in folder.iterdir()] == ["b"], what
        now = open_bundle(place).manifest.engines  # checks every hash
        if end.code:
            assert snapshot(place) == old, what
            assert now == held
        else:
            assert now.keys() == new.keys() and now != held, what
        assert not [path for path in place.rglob("*") if path.name.startswith(".")], what
    print(f"build, {fault}, {'replacement' if there else 'new engine'}: {tried} of {plain.calls} calls")
