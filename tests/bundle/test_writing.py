"""One whole bundle in its place and nothing beside it, whoever else writes there and however a process ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from doge_deploy.bundle import writing
from doge_deploy.bundle.files import MANIFEST
from doge_deploy.bundle.locks import BusyError, locked, take
from doge_deploy.bundle.writing import exchange, writing_bundle
from doge_deploy.errors import UsageError


def fill(folder: Path, content: str) -> None:
    """What stands for a bundle here."""
    (folder / "model.onnx").write_text(content)
    (folder / MANIFEST).write_text(json.dumps({"tool": {"name": "doge-deploy"}}))


def put(place: Path, content: str, *, force: bool = False) -> None:
    with writing_bundle(place, force=force) as aside:
        fill(aside, content)


def content(place: Path) -> str:
    assert sorted(path.name for path in place.iterdir()) == [MANIFEST, "model.onnx"]
    return (place / "model.onnx").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_place_with_its_parents(tmp_path: Path) -> None:
    put(tmp_path / "a" / "b" / "c", "new")
    assert content(tmp_path / "a" / "b" / "c") == "new" and names(tmp_path / "a" / "b") == ["c"]


def test_parents_that_were_made_go_where_the_export_fails(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), writing_bundle(tmp_path / "a" / "b" / "c", force=False):
        raise ZeroDivisionError
    assert names(tmp_path / "a") == []


def test_an_empty_parent_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), writing_bundle(tmp_path / "a" / "b", force=False):
        raise ZeroDivisionError
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == []


@pytest.mark.parametrize("at_once", [True, False], ids=["exchange", "three renames"])
def test_force_replaces(tmp_path: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(writing, "_exchange_at_once", lambda one, other: False)
    put(tmp_path / "b", "old")
    put(tmp_path / "b", "new", force=True)
    assert content(tmp_path / "b") == "new" and names(tmp_path) == ["b"]


def test_the_later_of_two_exports_to_one_new_place_says_that_it_exists(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="exists: another process made it meanwhile"),
        writing_bundle(tmp_path / "b", force=False) as late,
    ):
        put(tmp_path / "b", "first")
        fill(late, "late")
    assert content(tmp_path / "b") == "first" and names(tmp_path) == ["b"]


def test_with_force_the_later_of_two_replaces(tmp_path: Path) -> None:
    with writing_bundle(tmp_path / "b", force=True) as late:
        put(tmp_path / "b", "first")
        fill(late, "late")
    assert content(tmp_path / "b") == "late" and names(tmp_path) == ["b"]


def test_two_replacements_at_once(tmp_path: Path) -> None:
    put(tmp_path / "b", "old")
    with writing_bundle(tmp_path / "b", force=True) as first:
        with pytest.raises(UsageError, match="another export or build is writing to it"):
            put(tmp_path / "b", "second", force=True)
        fill(first, "first")
    assert content(tmp_path / "b") == "first" and names(tmp_path) == ["b"]


def test_force_during_a_build(tmp_path: Path) -> None:
    put(tmp_path / "b", "old")
    with (
        locked(tmp_path / "b", "busy"),
        pytest.raises(UsageError, match="another export or build is writing to it"),
    ):
        put(tmp_path / "b", "new", force=True)
    assert content(tmp_path / "b") == "old" and names(tmp_path) == ["b"]


def test_a_build_that_begins_during_a_replacement_does_not_lock_the_old_folder(tmp_path: Path) -> None:
    put(tmp_path / "b", "old")
    with writing_bundle(tmp_path / "b", force=True) as aside:
        with pytest.raises(BusyError):
            take(tmp_path / "b")
        fill(aside, "new")
    handle = take(tmp_path / "b")
    assert handle is not None
    os.close(handle)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same filesystem", "another filesystem"])
def test_a_link_to_a_bundle_stays_a_link(tmp_path: Path, elsewhere: bool) -> None:
    with other_filesystem() if elsewhere else contextlib.nullcontext(tmp_path / "real") as folder:
        folder.mkdir(exist_ok=True)
        put(folder / "b", "old")
        (tmp_path / "link").symlink_to(folder / "b")
        with pytest.raises(UsageError, match="exists; choose another"):
            put(tmp_path / "link", "new")
        put(tmp_path / "link", "new", force=True)
        assert (tmp_path / "link").is_symlink() and content(folder / "b") == "new"
        assert names(folder) == ["b"] and "link" in names(tmp_path)
        assert not [name for name in names(tmp_path) if name.startswith(".")]


@contextlib.contextmanager
def other_filesystem() -> Iterator[Path]:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == Path("/tmp").stat().st_dev:
        pytest.skip("needs a second filesystem that may be written to; /dev/shm is none")
    folder = shared / f"doge-deploy-test-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(UsageError, match="is a link to gone, which does not exist"):
        put(tmp_path / "link", "new", force=True)
    assert names(tmp_path) == ["link"]


@pytest.mark.parametrize("where", [".", "..", "below"])
def test_the_current_directory_is_refused(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "b"
    put(place, "old")
    (place / "sub").mkdir()
    monkeypatch.chdir(place / "sub" if where == ".." else place)
    output = Path("../b" if where == "below" else where)
    with pytest.raises(UsageError, match="is the current directory or holds it"):
        put(output, "new", force=True)
    assert (place / "model.onnx").read_text() == "old" and names(tmp_path) == ["b"]


def test_an_empty_directory_is_taken_with_force(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    put(tmp_path / "b", "new", force=True)
    assert content(tmp_path / "b") == "new" and names(tmp_path) == ["b"]


def test_a_mount_point_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "b", "old")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UsageError, match="is a mount point"):
        put(tmp_path / "b", "new", force=True)
    assert content(tmp_path / "b") == "old"


def test_a_folder_with_someone_elses_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / MANIFEST).write_text('{"name": "a web page", "icons": []}')
    with pytest.raises(UsageError, match="is not a bundle"):
        put(tmp_path / "app", "new", force=True)
    assert names(tmp_path / "app") == [MANIFEST]


def test_a_broken_bundle_is_replaced(tmp_path: Path) -> None:
    put(tmp_path / "b", "old")
    (tmp_path / "b" / MANIFEST).write_text("{")
    put(tmp_path / "b", "new", force=True)
    assert content(tmp_path / "b") == "new"


WRITE = """
import os, signal, sys
from pathlib import Path
from doge_deploy.bundle import writing
place, when = Path(sys.argv[1]), sys.argv[2]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if when != "fill":
    setattr(writing, when, die)
with writing.writing_bundle(place, force=True) as aside:
    (aside / "model.onnx").write_text("dead")
    (aside / "manifest.json").write_text('{"tool": {"name": "doge-deploy"}}')
    if when == "fill":
        die()
"""


@pytest.mark.parametrize("when", ["fill", "sync", "_publish", "exchange", "_sync_directory"])
@pytest.mark.parametrize("there", [False, True], ids=["new place", "replacement"])
def test_a_killed_export_leaves_one_whole_bundle_and_the_next_cleans_up(tmp_path: Path, when: str, there: bool) -> None:
    if there:
        put(tmp_path / "b", "old")
    killed = subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "b"), when], capture_output=True)
    if when == "exchange" and not there:  # nothing to exchange with
        assert killed.returncode == 0
        return
    assert killed.returncode == -signal.SIGKILL
    published = when == "_sync_directory"
    if published:
        assert (tmp_path / "b" / "model.onnx").read_text() == "dead"
    elif there:
        assert content(tmp_path / "b") == "old"
    else:
        assert names(tmp_path) == [name for name in names(tmp_path) if name.endswith(".partial")]
    put(tmp_path / "b", "next", force=True)
    assert content(tmp_path / "b") == "next" and names(tmp_path) == ["b"]


def test_a_bundle_that_a_killed_export_had_moved_away_comes_back(tmp_path: Path) -> None:
    put(tmp_path / "b", "old")
    (tmp_path / "b").rename(tmp_path / ".b.01234567.replaced")
    with pytest.raises(ZeroDivisionError), writing_bundle(tmp_path / "b", force=False):
        raise ZeroDivisionError
    assert content(tmp_path / "b") == "old" and names(tmp_path) == ["b"]


def test_what_another_export_is_writing_is_no_leftover(tmp_path: Path) -> None:
    with writing_bundle(tmp_path / "b", force=False) as first:
        put(tmp_path / "c", "another place")
        fill(first, "first")
        with pytest.raises(ZeroDivisionError), writing_bundle(tmp_path / "b", force=False):
            assert first.is_dir()
            raise ZeroDivisionError
    assert content(tmp_path / "b") == "first" and names(tmp_path) == ["b", "c"]


def test_a_name_with_characters_of_patterns(tmp_path: Path) -> None:
    other = tmp_path / ".ab.01234567.partial"
    other.mkdir()
    put(tmp_path / "[a]*", "new")
    assert names(tmp_path) == [".ab.01234567.partial", "[a]*"]


def test_an_exchange_that_fails_half_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "b", "old")
    put(tmp_path / "c", "new")
    monkeypatch.setattr(writing, "_exchange_at_once", lambda one, other: False)
    rename, count = Path.rename, 0

    def second_fails(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(5, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        exchange(tmp_path / "c", tmp_path / "b")
    assert content(tmp_path / "b") == "old" and content(tmp_path / "c") == "new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="cannot be written: Permission denied"):
            put(tmp_path / "a" / "b", "new")
    finally:
        tmp_path.chmod(0o700)


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        put(tmp_path / "file" / "b", "new")
    with pytest.raises(UsageError, match="cannot be written: File name too long"):
        put(tmp_path / ("n" * 300), "new")
    assert names(tmp_path) == ["file"]
