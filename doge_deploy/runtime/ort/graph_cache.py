"""Graphs as ONNX Runtime optimised them, kept in a folder so that a bundle opens faster the next time.

An entry is a folder of its own: the graph, the weights as the optimised graph has them (those of layers that read the
same state are joined in it), and the hashes of both. It is found by everything that it depends on; what is not whole,
or what ONNX Runtime does not read, is removed and made anew. (Of large files the size is compared, as when a bundle is
opened.) Nothing here raises where a folder cannot be written: then
there is no cache. Why so: docs/decisions/0033-a-cache-of-optimised-graphs.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from doge_deploy.bundle.file_check import FileCheck
from doge_deploy.bundle.files import QUICK_LIMIT_BYTES, WEIGHTS_FILE, FileEntry, sha256_file
from doge_deploy.bundle.opening import Bundle
from doge_deploy.devices.host import available_memory, processor_features

if TYPE_CHECKING:
    import onnxruntime

VARIABLE = "DOGE_DEPLOY_GRAPH_CACHE"
"""Environment variable: the folder, or `off`."""

LIMIT_BYTES = 2 << 30
"""Of all entries together; those that were not used for longest go first."""

GRAPH, RECORD = "model.onnx", "entry.json"
_PIECE_BYTES = 64 << 10
"""Of a weight file, written at once, see `_write_in_pieces`."""
_FORM = 2
"""Changes where an entry is made or read otherwise."""


class Open(Protocol):
    """Makes a session of a graph; `optimised` and `save_to` as in `session.open_session`."""

    def __call__(
        self, graph: Path, *, optimised: bool = False, save_to: Path | None = None
    ) -> onnxruntime.InferenceSession: ...


def cache_folder() -> Path | None:
    """Where entries are kept: `$DOGE_DEPLOY_GRAPH_CACHE`, else a folder in the user's cache; None where it is off, or
    belongs to somebody else.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in ("off", "0"):
        return None
    if chosen:
        folder = Path(chosen)
    else:
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # no home
            return None
        folder = home / "doge-deploy" / "onnxruntime"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError:
        return None
    return folder if not hasattr(os, "geteuid") or owner == os.geteuid() else None


def open_cached(bundle: Bundle, file: str, settings: Mapping[str, str], make: Open) -> onnxruntime.InferenceSession:
    """A session of a graph of the bundle: from the cache, or made and put there.

    Args:
        bundle: an opened bundle. Before its own files are read, or an entry is made of them, they are proved; an entry
            is opened before that is known, see `Bundle.prove`.
        file: of the graph.
        settings: what of the session's options changes the optimised graph.
        make: makes the session; what it raises for the bundle's own graph is raised.
    """
    folder = cache_folder()
    name = _name(bundle, file, settings) if folder is not None else None
    entry = None if folder is None or name is None else folder / name
    session = None if entry is None else _load(entry, make)
    if session is None:
        bundle.prove()
    if session is None and entry is not None and _may_write(bundle):
        session = _make(entry, bundle.path / file, make)
    return make(bundle.path / file) if session is None else session


def _name(bundle: Bundle, file: str, settings: Mapping[str, str]) -> str | None:
    """The hash of everything that an entry depends on; None where something of it is not known."""
    import onnxruntime

    weights = bundle.path / WEIGHTS_FILE
    try:
        changed = weights.stat().st_mtime_ns  # large files are not hashed when a bundle is opened
    except OSError:
        return None
    parts = {
        "form": _FORM,
        "graph": bundle.manifest.files[file]["sha256"],
        "weights": [bundle.manifest.files[WEIGHTS_FILE]["sha256"], changed],
        "onnxruntime": [onnxruntime.__version__, onnxruntime.get_build_info()],
        "processor": [platform.machine(), *processor_features()],
        "settings": dict(sorted(settings.items())),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _load(entry: Path, make: Open) -> onnxruntime.InferenceSession | None:
    """The session of an entry that is whole; what is not is removed."""
    record = entry / RECORD
    if not entry.is_dir():
        return None
    try:
        files: dict[str, FileEntry] = json.loads(record.read_bytes())
        check = FileCheck(entry, files, quick=True)
        if GRAPH in files and not check.found:
            session = make(entry / GRAPH, optimised=True)
            if not check.problems():
                with suppress(OSError):
                    os.utime(record)
                return session
    except Exception:  # whatever is wrong with an entry, the bundle itself decides what is said
        pass
    _remove(entry)
    return None


def _may_write(bundle: Bundle) -> bool:
    """Whether there is room: in the cache, and for the weights once more in memory while they are written."""
    size, memory = bundle.manifest.files[WEIGHTS_FILE]["bytes"], available_memory()
    return size <= LIMIT_BYTES // 2 and (memory is None or memory > 4 * size)


def _make(entry: Path, graph: Path, make: Open) -> onnxruntime.InferenceSession | None:
    """A session of the bundle's graph, and its entry; None where that cannot be written."""
    import tempfile  # with what it imports it takes 2 ms, which opening an entry does not wait for

    made: Path | None = None
    try:
        made = Path(tempfile.mkdtemp(prefix=".", dir=entry.parent))
        session = make(graph, save_to=made / GRAPH)
        for file in [one for one in made.iterdir() if one.name != GRAPH]:
            _write_in_pieces(file)
        files = {file.name: _file_entry(file) for file in made.iterdir()}
        (made / RECORD).write_text(json.dumps(files))
        with suppress(OSError):  # another process was faster
            made.rename(entry)
        _remove_oldest(entry.parent)
    except Exception:  # a full disk says so in ONNX Runtime's words; the graph's own faults are found without a cache
        return None
    finally:
        if made is not None:
            _remove(made)
    return session


def _write_in_pieces(file: Path) -> None:
    """Write a file anew, piece by piece.

    What is written at once Linux keeps in pages as large, up to 2 MB, and maps whole: then a few tokens that are looked
    up in a mapped embedding bring all of it into the memory of the process.
    """
    aside = file.with_name(f"{file.name}.partial")
    with file.open("rb", buffering=0) as source, aside.open("wb", buffering=0) as target:
        while piece := source.read(_PIECE_BYTES):
            target.write(piece)
    aside.replace(file)


def _file_entry(file: Path) -> FileEntry:
    """As of a bundle's file, without the hash of a large one, which nobody compares."""
    size = file.stat().st_size
    return {"sha256": "" if size > QUICK_LIMIT_BYTES else sha256_file(file), "bytes": size}


def _remove(folder: Path) -> None:
    """Without a word where it cannot be removed."""
    import shutil  # see `_make`

    shutil.rmtree(folder, ignore_errors=True)


def _remove_oldest(folder: Path) -> None:
    """Keep the entries within `LIMIT_BYTES`. Another process may do the same."""
    entries = []
    for record in folder.glob(f"*/{RECORD}"):
        with suppress(OSError):
            size = sum(file.stat().st_size for file in record.parent.iterdir())
            entries.append((record.stat().st_mtime, size, record.parent))
    left = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if left <= LIMIT_BYTES:
            return
        _remove(entry)
        left -= size
