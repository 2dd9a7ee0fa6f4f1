"""Putting a bundle in its place: there whole or not at all, whatever ends the process.

The bundle is written into a folder beside its place, `.NAME.xxxxxxxx.partial`, whose lock this process holds; then the
two change places in one step. A folder of that name without a lock was left by a process that was killed, and the next
export to the same place removes it.
Reference: renameat2(2), flock(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from doge_deploy.bundle.files import MANIFEST
from doge_deploy.bundle.locks import BusyError, locked, take
from doge_deploy.bundle.manifest import Manifest
from doge_deploy.errors import UsageError

_FULL = frozenset(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO") if hasattr(errno, name)
)
"""Errors of a write that Python raises without the name of the file."""

_TAKEN = frozenset((errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR))


def manifest_bytes(manifest: Manifest) -> bytes:
    """What manifest.json holds, the same bytes for the same manifest."""
    return (json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n").encode()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json. An older one is replaced in one step."""
    aside = directory / f".{MANIFEST}.partial"
    with aside.open("wb") as file:
        file.write(manifest_bytes(manifest))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(directory / MANIFEST)


@contextlib.contextmanager
def writing_bundle(output: Path, *, force: bool) -> Iterator[Path]:
    """A directory to write into, which becomes `output` when the block ends well and vanishes when it does not.

    Where `output` is a symbolic link the bundle that it leads to is replaced, and the link stays.

    Raises:
        UsageError: `output` exists and `force` is false, is not a bundle, is in use, or cannot be written; or another
            process put something there meanwhile.
    """
    place = check_place(output, force=force)
    busy = f"{output}: another export or build is writing to it; try again when it is done"
    with ExitStack() as stack:
        with saying_where(output, Path(place.anchor)):
            stack.enter_context(_parents(place.parent))
            held = place.exists()
            if held:
                stack.enter_context(locked(place, busy))
            remove_leftovers(place)
            aside = stack.enter_context(_aside(place))
        with saying_where(output, aside):
            yield aside
            sync(aside)
        with saying_where(output, place.parent):
            if force and place.exists() and not held:  # another process made it meanwhile
                stack.enter_context(locked(place, busy))
            _publish(aside, place, output, force=force)


def check_place(output: Path, *, force: bool) -> Path:
    """Where the bundle goes once links are followed; raises UsageError where it may not go there."""
    if not os.path.lexists(output):
        return Path(os.path.realpath(output))
    if not force:
        raise UsageError(f"{output} exists; choose another --output, or replace it with --force")
    if not output.exists():
        raise UsageError(f"{output} is a link to {os.readlink(output)}, which does not exist; remove the link")
    place = Path(os.path.realpath(output))
    if not _replaceable(place):
        raise UsageError(f"{output} exists and is not a bundle; --force replaces only bundles")
    if os.path.ismount(place):
        raise UsageError(f"{output} is a mount point, which cannot be replaced; give a folder inside of it")
    with contextlib.suppress(FileNotFoundError):  # of a current directory that was removed
        here = Path.cwd()
        if place == here or place in here.parents:
            raise UsageError(f"{output} is the current directory or holds it; run this from outside of it")
    return place


def _replaceable(place: Path) -> bool:
    """A bundle, a broken one too, or an empty directory."""
    if not place.is_dir():
        return False
    try:
        tool = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["tool"]["name"]
    except FileNotFoundError:
        return not any(place.iterdir())
    except (OSError, ValueError, KeyError, TypeError):  # some other manifest.json, if there is no graph beside it
        return (place / "model.onnx").is_file()
    return bool(tool == "doge-deploy")


@contextlib.contextmanager
def saying_where(output: Path, folder: Path) -> Iterator[None]:
    """Make one line of an OSError about `folder`: that `output` cannot be written, and why.

    Raises:
        UsageError: in place of such an OSError. Errors about other files pass.
    """
    try:
        yield
    except OSError as error:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        ours = any(Path(name) == folder or folder in Path(name).parents for name in names)
        if not ours and (names or error.errno not in _FULL):
            raise
        raise UsageError(f"{output} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; those that were made go again where the block fails."""
    made = []
    try:
        for above in reversed((folder, *folder.parents)):
            if not above.is_dir():
                made.append(above)
                above.mkdir(exist_ok=True)  # another process may have made it meanwhile
        yield
    except BaseException:
        for above in reversed(made):
            with contextlib.suppress(OSError):
                above.rmdir()
        raise


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


@contextlib.contextmanager
def _aside(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, with its lock; removed at the end, whatever it holds by then."""
    while True:
        # Named before it is made: an interrupt right after its making already finds it in the block that removes it.
        aside = place.parent / f".{place.name}.{secrets.token_hex(4)}.partial"
        handle = None
        try:
            aside.mkdir()
            try:
                handle = take(aside)
            except (BusyError, FileNotFoundError):  # another export took it for a leftover
                continue
            yield aside
            return
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            _close(handle)


def remove_leftovers(place: Path) -> None:
    """Remove what killed exports left beside `place`; a bundle that one of them had moved away comes back."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.(partial|replaced)")
    for left in [path for path in place.parent.iterdir() if pattern.fullmatch(path.name)]:
        try:
            handle = take(left)
        except (BusyError, OSError):
            continue
        try:
            if handle is None:
                continue  # nobody can tell whether its process lives
            if left.suffix == ".replaced" and not place.exists():
                left.rename(place)
            else:
                shutil.rmtree(left, ignore_errors=True)
        finally:
            _close(handle)


def sync(folder: Path) -> None:
    """Wait until the files of a folder are on the disk: before that, a disk may still turn out to be full."""
    for path in (*sorted(folder.iterdir()), folder):
        sync_path(path)


def sync_path(path: Path) -> None:
    """The same for one file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(aside: Path, place: Path, output: Path, *, force: bool) -> None:
    """Put `aside` in its place in one step. What was there before is in `aside` afterwards."""
    try:
        aside.rename(place)  # succeeds where nothing is there, or an empty directory
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        if not force or not _replaceable(place):
            raise UsageError(f"{output} exists: another process made it meanwhile") from None
        exchange(aside, place)
    with contextlib.suppress(OSError):  # it is there, whatever becomes of the machine's power
        _sync_directory(place.parent)


def _sync_directory(folder: Path) -> None:
    """The last step, a name of its own so that it can be broken alone."""
    sync_path(folder)


def exchange(one: Path, other: Path) -> None:
    """Two folders change places: in one step on Linux, by three renames where the filesystem cannot do that.

    Raises:
        OSError: they did not.
    """
    if _exchange_at_once(one, other):
        return
    between = one.with_suffix(".replaced")
    other.rename(between)
    try:
        one.rename(other)
    except BaseException:
        between.rename(other)
        raise
    between.rename(one)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange_at_once(one: Path, other: Path) -> bool:
    """False where the system or the filesystem has no such call."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
