"""Files that the first worker who needs them makes, for all workers of a session; no test writes into them.

`conftest.py` names the folder. Outside of pytest there is none, and `made_once` says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

_root: Path | None = None


def use_folder(folder: Path) -> None:
    """Keep what is shared in `folder`, which the workers of a session have in common."""
    global _root
    _root = folder
    folder.mkdir(parents=True, exist_ok=True)


def made_once(name: str, key: Any, make: Callable[[Path], object]) -> Path:
    """The directory that `make` writes, made by the first caller of the session with this `key`.

    `name` is for people who look into the folder; `key` is anything that JSON can hold. `make` gets a path
    that does not exist yet, and may fail: the next caller then tries again.
    """
    if _root is None:
        raise RuntimeError("shared files exist in a session of pytest only; see conftest.py")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    place = _root / f"{name}-{digest}"
    made = place / name
    if made.exists():
        return made
    with FileLock(_root / f"{place.name}.lock"):
        if not made.exists():
            partial = place / f"{name}.partial"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            make(partial)
            (place / "stamps.json").write_text(json.dumps(_stamps(partial)))
            os.replace(partial, made)
    return made


def changed_files() -> list[str]:
    """Shared files that are no longer what was made: a test wrote into them instead of into a copy."""
    found = []
    for stamps in sorted(_root.glob("*/stamps.json")) if _root else []:
        for made in (path for path in stamps.parent.iterdir() if path.is_dir() and path.suffix != ".partial"):
            before, now = json.loads(stamps.read_text()), _stamps(made)
            found += [str(made / name) for name in sorted(before | now) if before.get(name) != now.get(name)]
    return found


def content(directory: Path) -> str:
    """A digest of the names and bytes of the files of `directory`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stamps(directory: Path) -> dict[str, list[int]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
