"""Engines in a bundle: put there whole, or not at all.

An engine is written aside, in a folder whose name begins with a dot; renamed; and only then named in the manifest,
which is replaced in one step. Whenever the process ends, the manifest names only what is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from doge_deploy.bundle.engine_record import ENGINES, EngineRecord
from doge_deploy.bundle.manifest import MANIFEST, Bundle, Manifest, file_entry, write_manifest
from doge_deploy.errors import BrokenBundleError, UsageError


@contextlib.contextmanager
def staging(bundle: Bundle) -> Iterator[Path]:
    """A folder for the files of a new engine; what is left of it at the end vanishes. One build at a time has it.

    Raises:
        UsageError: another build is at work on the bundle, or it cannot be written.
    """
    engines = bundle.path / ENGINES
    try:
        with _locked(bundle.path):
            try:
                engines.mkdir(exist_ok=True)
                for left in engines.glob(".*"):  # of a build that was killed
                    shutil.rmtree(left, ignore_errors=True)
                aside = engines / f".{secrets.token_hex(4)}.partial"
                aside.mkdir()
                yield aside
            finally:
                # By pattern: whatever was begun, an interrupt right after its making included, is found here.
                for left in engines.glob(".*"):
                    shutil.rmtree(left, ignore_errors=True)
                with contextlib.suppress(OSError):
                    engines.rmdir()  # succeeds where no engine came of it
    except PermissionError as error:
        raise UsageError(f"{bundle.path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """An advisory lock that the system drops when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: there builds are not kept apart
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another build is writing to {directory}; try again when it is done") from None
        yield
    finally:
        os.close(handle)


def commit(bundle: Bundle, staged: Path, record: EngineRecord) -> Manifest:
    """Make the files in `staged` the engine `record`, in place of one of that name; the new manifest.

    Raises:
        BrokenBundleError: the bundle was exported anew meanwhile.
    """
    manifest = Manifest.from_json(json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8")))
    for source in (record.onnx, record.weights):
        if manifest.files.get(source.file, {}).get("sha256") != source.sha256:
            raise BrokenBundleError(
                f"{bundle.path}: {source.file} was replaced while the engine was built; build again"
            )
    place = bundle.path / record.directory
    files = {f"{record.directory}/{file.name}": file_entry(file) for file in sorted(staged.iterdir())}
    if place.exists():
        without = remove(manifest, place.name)
        if without != manifest:
            write_manifest(bundle.path, without)
        shutil.rmtree(place)
        manifest = without
    staged.rename(place)
    manifest = replace(
        manifest,
        files={**manifest.files, **files},
        engines={**manifest.engines, place.name: record},
    )
    write_manifest(bundle.path, manifest)
    return manifest


def remove(manifest: Manifest, name: str) -> Manifest:
    """The manifest without the engine called `name`."""
    prefix = f"{ENGINES}/{name}/"
    return replace(
        manifest,
        files={file: entry for file, entry in manifest.files.items() if not file.startswith(prefix)},
        engines={other: record for other, record in manifest.engines.items() if other != name},
    )
