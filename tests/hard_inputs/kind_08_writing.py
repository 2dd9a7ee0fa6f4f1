"""Places that a bundle may go to: links, the current directory, a place that others write to, a disk that is full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from doge_deploy.bundle.files import MANIFEST
from doge_deploy.bundle.locks import locked
from doge_deploy.bundle.writing import writing_bundle
from doge_deploy.errors import UsageError
from hard_inputs.frame import Case, Outcome, equal, refused, wrong

KIND = "8 writing"


def put(place: Path, content: str, *, force: bool = False) -> None:
    """What stands for an export: the writing is the same, and takes no trace."""
    with writing_bundle(place, force=force) as aside:
        (aside / "model.onnx").write_text(content)
        (aside / MANIFEST).write_text(json.dumps({"tool": {"name": "doge-deploy"}}))


def left(folder: Path, place: Path, content: str | None, *others: str) -> Outcome:
    """One whole bundle in its place (or none), and nothing else beside it."""
    found = (place / "model.onnx").read_text() if place.exists() else None
    expected = sorted([*others, *([place.name] if content is not None and place.parent == folder else [])])
    return equal((found, sorted(path.name for path in folder.iterdir())), (content, expected))


def refusing(folder: Path, output: Path, place: Path, content: str | None, words: str, *others: str) -> Outcome:
    try:
        put(output, "new", force=True)
    except UsageError as error:
        if words not in str(error):
            return wrong(f"{words!r} is not in {error}")
        outcome = left(folder, place, content, *others)
        return refused(str(error)) if outcome.verdict == "right" else outcome
    return wrong("not refused")


def two_to_a_new_place(folder: Path) -> Outcome:
    place = folder / "b"
    try:
        with writing_bundle(place, force=False) as late:
            put(place, "first")
            (late / "model.onnx").write_text("late")
    except UsageError as error:
        outcome = left(folder, place, "first")
        return refused(str(error)) if "exists" in str(error) and outcome.verdict == "right" else outcome
    return wrong("the later one replaced the first")


def replaced(folder: Path) -> Outcome:
    put(folder / "b", "old")
    put(folder / "b", "new", force=True)
    return left(folder, folder / "b", "new")


def link(folder: Path) -> Outcome:
    put(folder / "real", "old")
    (folder / "link").symlink_to("real")
    put(folder / "link", "new", force=True)
    if not (folder / "link").is_symlink():
        return wrong("the link was replaced")
    return left(folder, folder / "real", "new", "link")


def link_to_nothing(folder: Path) -> Outcome:
    (folder / "link").symlink_to("gone")
    return refusing(folder, folder / "link", folder / "gone", None, "is a link to gone", "link")


def from_inside(folder: Path, output: str) -> Outcome:
    put(folder / "b", "old")
    before = Path.cwd()
    os.chdir(folder / "b")
    try:
        return refusing(folder, Path(output), folder / "b", "old", "is the current directory or holds it")
    finally:
        os.chdir(before)


def during_a_build(folder: Path) -> Outcome:
    put(folder / "b", "old")
    with locked(folder / "b", "busy"):
        return refusing(folder, folder / "b", folder / "b", "old", "another export or build is writing")


def not_a_bundle(folder: Path) -> Outcome:
    (folder / "thesis").mkdir()
    (folder / "thesis" / MANIFEST).write_text('{"name": "a web page"}')
    return refusing(folder, folder / "thesis", folder / "b", None, "is not a bundle", "thesis")


def an_empty_folder(folder: Path) -> Outcome:
    (folder / "b").mkdir()
    put(folder / "b", "new", force=True)
    return left(folder, folder / "b", "new")


def an_export_that_fails(folder: Path) -> Outcome:
    try:
        with writing_bundle(folder / "a" / "b", force=False):
            raise ZeroDivisionError
    except ZeroDivisionError:
        return left(folder, folder / "a" / "b", None)


WRITE = """
import os, signal, sys
from pathlib import Path
from doge_deploy.bundle.writing import writing_bundle
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with writing_bundle(Path(sys.argv[1]), force=True) as aside:
    (aside / "model.onnx").write_text("dead")
    os.kill(os.getpid(), int(sys.argv[2]))
"""


def ended_by(folder: Path, number: int) -> Outcome:
    put(folder / "b", "old")
    subprocess.run([sys.executable, "-c", WRITE, str(folder / "b"), str(number)], capture_output=True)
    if (folder / "b" / "model.onnx").read_text() != "old":
        return wrong("the old bundle is gone")
    if number != signal.SIGKILL:
        return left(folder, folder / "b", "old")
    put(folder / "b", "new", force=True)
    return left(folder, folder / "b", "new")


def too_long(folder: Path) -> Outcome:
    return refusing(folder, folder / ("n" * 300), folder / "b", None, "File name too long")


def below_a_file(folder: Path) -> Outcome:
    (folder / "file").write_text("")
    return refusing(folder, folder / "file" / "b", folder / "b", None, "cannot be written", "file")


def another_filesystem(folder: Path) -> Outcome:
    shared = Path("/dev/shm") / f"doge-deploy-hard-input-{os.getpid()}"
    if not os.access("/dev/shm", os.W_OK):
        return left(folder, folder / "b", None)
    try:
        put(shared / "b", "old")
        (folder / "link").symlink_to(shared / "b")
        put(folder / "link", "new", force=True)
        return left(shared, shared / "b", "new")
    finally:
        subprocess.run(["rm", "-rf", str(shared)], check=True)


def cases() -> list[Case]:
    return [
        Case("two exports to one new place", two_to_a_new_place),
        Case("--force", replaced),
        Case("--force on a link", link),
        Case("--force on a link to another filesystem", another_filesystem),
        Case("--force on a link to nothing", link_to_nothing),
        Case("--force on .", lambda folder: from_inside(folder, ".")),
        Case("--force on ../b from inside b", lambda folder: from_inside(folder, "../b")),
        Case("--force on .. from inside", lambda folder: from_inside(folder, "../../" + folder.name + "/b")),
        Case("--force during a build", during_a_build),
        Case("--force on what is no bundle", not_a_bundle),
        Case("--force on an empty folder", an_empty_folder),
        Case("an export that fails in a new folder", an_export_that_fails),
        Case("SIGTERM while writing", lambda folder: ended_by(folder, signal.SIGTERM)),
        Case("SIGKILL while writing", lambda folder: ended_by(folder, signal.SIGKILL)),
        Case("a name that is too long", too_long),
        Case("a place below a file", below_a_file),
    ]
