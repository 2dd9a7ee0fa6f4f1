"""Files that are hashed while they are written."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from doge_deploy.bundle.files import FileEntry, HashedFile, file_entries, file_entry


@pytest.mark.parametrize("parts", [[], [b""], [b"one"], [b"a" * 100_000, b"", b"b" * 3, bytes(range(256))]])
def test_the_entry_is_that_of_the_file(tmp_path: Path, parts: list[bytes]) -> None:
    path = tmp_path / "weights"
    with HashedFile(path) as file:
        for part in parts:
            file.write(memoryview(part))
    assert path.read_bytes() == b"".join(parts)
    assert file.entry() == file_entry(path)
    assert file.entry()["sha256"] == hashlib.sha256(b"".join(parts)).hexdigest()


def test_sizes_are_bytes_whatever_the_numbers_are(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "weights") as file:
        file.write(memoryview(b"12345678").cast("d"))
    assert file.entry()["bytes"] == 8


def test_an_error_of_writing_comes_out() -> None:
    with pytest.raises(OSError) as caught, HashedFile(Path("/dev/full")) as file:
        file.write(b"x" * 1_000_000)
    assert caught.value.errno == errno.ENOSPC


def test_an_error_of_writing_stops_who_goes_on() -> None:
    with pytest.raises(OSError) as caught, HashedFile(Path("/dev/full")) as file:
        for _ in range(2):
            file.write(b"x" * 1_000_000)
        pytest.fail("the second call did not say that the first could not write")
    assert caught.value.errno == errno.ENOSPC


def test_what_else_goes_wrong_comes_out_and_the_file_is_closed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), HashedFile(tmp_path / "weights") as file:
        file.write(b"x" * 1_000_000)
        raise KeyError("another")
    assert (tmp_path / "weights").stat().st_size == 1_000_000 and file._file.closed


def test_known_entries_are_not_hashed_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    known = {"b": FileEntry(sha256="0" * 64, bytes=1)}
    found = file_entries(tmp_path, known)
    assert found["a"] == file_entry(tmp_path / "a")
    assert found["b"] == known["b"]
