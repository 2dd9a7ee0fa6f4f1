"""The files of a bundle against its manifest, large ones hashed by a thread while their reader goes on.

The reference implementation is `files.file_problems`, file by file; it also has the word where something is wrong, so
that a damaged bundle is described in the same way whoever found it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from doge_deploy.bundle.files import QUICK_LIMIT_BYTES, FileEntry, file_problems, hash_problem, size_problem
from doge_deploy.process.background import InBackground

AT_ONCE_BYTES = 4 * 1024 * 1024
"""Files up to this size are hashed by the caller, a tokenizer among them: 2 ms. The thread then reads weights at once,
and gives their memory back before a session takes most of its own."""

PIECE_BYTES = QUICK_LIMIT_BYTES
"""Read at once by the thread. Between two pieces it needs the interpreter, and waits for whoever has it: 5 ms for a
turn of Python's, all of the time that a library takes to parse a tokenizer. So a file of a quick check is one piece."""


class FileCheck:
    """A check that has begun: sizes were compared and small files hashed, the others are being hashed.

    Args:
        directory: of the bundle.
        files: what its manifest says of them.
        quick: of files above `QUICK_LIMIT_BYTES` only the size counts.

    Raises:
        OSError: a small file cannot be read.
    """

    def __init__(self, directory: Path, files: Mapping[str, FileEntry], *, quick: bool) -> None:
        self._directory, self._files, self._quick = directory, files, quick
        self._large: InBackground[list[str]] | None = None
        self.found: list[str] = []
        """What is wrong as far as it is known."""
        later: dict[str, FileEntry] = {}
        for name, entry in files.items():
            problem = size_problem(directory, name, entry)
            if problem is None and not (quick and entry["bytes"] > QUICK_LIMIT_BYTES):
                if entry["bytes"] > AT_ONCE_BYTES:
                    later[name] = entry
                else:
                    problem = hash_problem(directory, name, entry)
            if problem is not None:
                self.found.append(problem)
        if later:
            self._large = InBackground(lambda: self._hash(later), "doge-hash", abandoned_at_exit=True)

    def _hash(self, files: Mapping[str, FileEntry]) -> list[str]:
        problems = (hash_problem(self._directory, name, entry, PIECE_BYTES) for name, entry in files.items())
        return [problem for problem in problems if problem is not None]

    def problems(self) -> list[str]:
        """Wait for the hashes: what is missing or was altered, as `file_problems` says it.

        Raises:
            OSError: a file cannot be read.
        """
        if self._large is not None:
            self.found += self._large.result()
            self._large = None
        if self.found:
            # in the order of the manifest; what has been put right since then was wrong all the same
            return list(file_problems(self._directory, self._files, quick=self._quick)) or self.found
        return []
