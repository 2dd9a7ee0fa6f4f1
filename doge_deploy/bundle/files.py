"""The files of a bundle: their names, sizes and hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, TypedDict

from doge_deploy.bundle.typed_json import Check

if TYPE_CHECKING:
    from concurrent.futures import Future

MANIFEST = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
"""What every graph refers to, whatever is in it."""
CALIBRATION_TOKENS = "calibration.json"
"""The tokens that numbers of 4 bits were chosen on, so that anybody can choose them again."""

Sha256 = Annotated[
    str, Check("64 lowercase hexadecimal digits", lambda text: re.fullmatch("[0-9a-f]{64}", text) is not None)
]
Size = Annotated[int, Check("a whole number >= 0", lambda number: number >= 0)]

FILE_NAME = "a relative path of '/' and plain names that stays inside the bundle"


def is_inside(name: str) -> bool:
    """Whether a name from a manifest is a relative path that cannot lead out of the bundle, on any system."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not re.search(r"[\\:\x00-\x1f\x7f]", name)


FileName = Annotated[str, Check(FILE_NAME, is_inside)]


class FileEntry(TypedDict):
    """What a manifest says of one file."""

    sha256: Sha256
    bytes: Size


QUICK_LIMIT_BYTES = 16 * 1024 * 1024
"""A quick check hashes files up to this size and compares only the size of larger ones."""


def file_problems(directory: Path, files: Mapping[str, FileEntry], *, quick: bool) -> Iterator[str]:
    """What is missing or was altered, a sentence each.

    A link is as good as its bytes, wherever they lie: in a cache of the Hugging Face hub every file is a link to a blob
    beside the snapshot. That the names stay inside is the manifest's matter.
    """
    for name, entry in files.items():
        problem = size_problem(directory, name, entry)
        if problem is None and not (quick and entry["bytes"] > QUICK_LIMIT_BYTES):
            problem = hash_problem(directory, name, entry)
        if problem is not None:
            yield problem


def size_problem(directory: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a file as far as its size tells."""
    file = directory / name
    if not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"{name} was altered ({size} bytes, manifest says {entry['bytes']})"
    return None


def hash_problem(directory: Path, name: str, entry: FileEntry, piece: int = 1 << 20) -> str | None:
    """What is wrong with the bytes of a file; `piece` as of `sha256_file`."""
    if sha256_file(directory / name, piece) != entry["sha256"]:
        return f"{name} was altered (its sha256 is not the manifest's)"
    return None


def sha256_file(path: Path, piece: int = 1 << 20) -> str:
    """Hex digest of a file's bytes, of which `piece` are read at once."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(piece):
            digest.update(chunk)
    return digest.hexdigest()


def file_entry(file: Path) -> FileEntry:
    """What a manifest says of one file."""
    return {"sha256": sha256_file(file), "bytes": file.stat().st_size}


def file_entries(directory: Path, known: Mapping[str, FileEntry] = MappingProxyType({})) -> dict[str, FileEntry]:
    """`files` of a manifest: every file in `directory` but the manifest itself, and without engines.

    Args:
        directory: of the bundle.
        known: entries of files that were hashed while they were written; these are not read again.
    """
    return {
        file.name: known.get(file.name) or file_entry(file)
        for file in sorted(directory.iterdir())
        if file.is_file() and file.name != MANIFEST
    }


class HashedFile:
    """A new file that is hashed as it is written, each by a thread of its own: both take as long as making the data.

    Args:
        path: the file; what is there is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._pending: tuple[Future[object], ...] = ()

    def __enter__(self) -> HashedFile:
        from concurrent.futures import ThreadPoolExecutor  # what only reads bundles does not wait for it

        self._file = self._path.open("wb")
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="doge-write")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown()
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Begin to write and to hash `data`, which must not change until the next call or the end.

        Raises:
            OSError: the data of the last call could not be written; the end raises it for those of this one.
        """
        self._finish()
        self._pending = self._threads.submit(self._digest.update, data), self._threads.submit(self._file.write, data)
        self._bytes += memoryview(data).nbytes

    def _finish(self) -> None:
        """Wait for what was begun."""
        for begun in self._pending:
            begun.result()
        self._pending = ()

    def entry(self) -> FileEntry:
        """What a manifest says of the file; to be asked once it is closed."""
        return {"sha256": self._digest.hexdigest(), "bytes": self._bytes}
