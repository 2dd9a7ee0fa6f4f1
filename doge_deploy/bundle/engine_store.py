"""Engines in a bundle: put there whole, or not at all.

An engine is written aside, in a folder whose name begins with a dot; renamed; and only then named in the manifest,
which is replaced in one step. Whenever the process ends, the manifest names only what is there.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from doge_deploy.bundle.engine_record import ENGINES, EngineRecord
from doge_deploy.bundle.files import MANIFEST, file_entry
from doge_deploy.bundle.locks import locked
from doge_deploy.bundle.manifest import Manifest
from doge_deploy.bundle.opening import Bundle, load_manifest
from doge_deploy.bundle.writing import exchange, saying_where, sync, write_manifest
from doge_deploy.errors import BrokenBundleError


@contextlib.contextmanager
def staging(bundle: Bundle) -> Iterator[Path]:
    """A folder for the files of a new engine; what is left of it at the end vanishes. One build at a time has it.

    Raises:
        UsageError: another build or export is at work on the bundle, or it cannot be written.
    """
    engines = bundle.path / ENGINES
    busy = f"another build or export is writing to {bundle.path}; try again when it is done"
    with saying_where(bundle.path, bundle.path), locked(bundle.path, busy):
        try:
            engines.mkdir(exist_ok=True)
            _remove_hidden(engines)  # of a build that was killed
            aside = engines / f".{secrets.token_hex(4)}.partial"
            aside.mkdir()
            yield aside
        finally:
            # By pattern: whatever was begun, an interrupt right after its making included, is found here.
            _remove_hidden(engines)
            with contextlib.suppress(OSError):
                engines.rmdir()  # succeeds where no engine came of it


def _remove_hidden(engines: Path) -> None:
    for left in engines.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


def commit(bundle: Bundle, staged: Path, record: EngineRecord) -> Manifest:
    """Make the files in `staged` the engine `record`, in place of one of that name; the new manifest.

    All that needs space is written first. Then there are only renames, each of which leaves a bundle whose manifest
    names what is there; if one of them fails, those before it are taken back.

    Raises:
        BrokenBundleError: the bundle was exported anew meanwhile.
    """
    manifest = load_manifest(bundle.path)
    for source in (record.onnx, record.weights):
        entry = manifest.files.get(source.file)
        if entry is None or entry["sha256"] != source.sha256:
            raise BrokenBundleError(
                f"{bundle.path}: {source.file} was replaced while the engine was built; build again"
            )
    place = bundle.path / record.directory
    files = {f"{record.directory}/{file.name}": file_entry(file) for file in sorted(staged.iterdir())}
    without = remove(manifest, place.name)
    new = replace(
        without,
        files={**without.files, **files},
        engines={**without.engines, place.name: record},
    )
    sync(staged)
    prepared = staged.with_suffix(".manifests")
    for name, content in (("old", manifest), ("without", without), ("new", new)):
        (prepared / name).mkdir(parents=True)
        write_manifest(prepared / name, content)

    def name_files(which: str) -> None:
        (prepared / which / MANIFEST).replace(bundle.path / MANIFEST)

    with contextlib.ExitStack() as undo:
        if without != manifest:
            undo.callback(name_files, "old")
            name_files("without")
        if place.exists():
            exchange(staged, place)
            undo.callback(exchange, staged, place)
        else:
            staged.rename(place)
            undo.callback(place.rename, staged)
        name_files("new")
        undo.pop_all()
    return new


def remove(manifest: Manifest, name: str) -> Manifest:
    """The manifest without the engine called `name`."""
    prefix = f"{ENGINES}/{name}/"
    return replace(
        manifest,
        files={file: entry for file, entry in manifest.files.items() if not file.startswith(prefix)},
        engines={other: record for other, record in manifest.engines.items() if other != name},
    )
