"""A bundle in one compressed file, `pack`, and back, `unpack`: both check every byte against the manifest.

The file is a tar archive, compressed by Zstandard (RFC 8878), that any `tar --zstd -xf` opens. The manifest is its
first member, so that everything after it is known before it is read: its name, its size and its hash. What the manifest
does not name is refused, so nothing can be written outside of the new bundle, and no archive can grow beyond what its
manifest says. Times, owners and modes are not kept, so the same bundle gives the same file.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, cast

from doge_deploy.bundle.engine_store import remove
from doge_deploy.bundle.files import MANIFEST, FileEntry
from doge_deploy.bundle.manifest import Manifest
from doge_deploy.bundle.opening import Bundle, load_manifest, open_bundle
from doge_deploy.bundle.writing import manifest_bytes, saying_where, sync, writing_bundle
from doge_deploy.devices.packages import require_packages
from doge_deploy.errors import BrokenBundleError, UsageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

DEFAULT_LEVEL = 12
"""Of Zstandard. Engines in few bits gain little from more, and 19 takes ten times as long."""

_MANIFEST_LIMIT_BYTES = 64 * 1024 * 1024
_HEADERS_BYTES = 16 * 1024
"""More than what tar writes beside a member's bytes: its header, a longer name, what fills the last block."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote."""

    path: Path
    sha256: str
    """Of the archive's bytes, for `unpack --sha256`."""
    bytes: int
    bundle_bytes: int
    """Of the files in it, the manifest included."""


def pack(
    bundle: str | Path, output: str | Path, *, level: int = DEFAULT_LEVEL, engines: tuple[str, ...] = ()
) -> Packed:
    """Write a bundle, its engines included, into one compressed file, which is there whole or not at all.

    Args:
        bundle: the directory; every file is compared with the manifest.
        output: the new file; one that is there is replaced.
        level: of Zstandard, 1 (fastest) to 22 (smallest).
        engines: only these; none named: all of them.

    Raises:
        UsageError: there is no such bundle or engine, the level is none, or the file cannot be written.
        BrokenBundleError: a file of the bundle is missing or was altered.
        MissingDependencyError: `zstandard` is not installed.
    """
    require_packages(("zstandard",), user="pack", extra="archive")
    import zstandard

    if not 1 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
        raise UsageError(f"level {level}: must be 1 to {zstandard.MAX_COMPRESSION_LEVEL}")
    output = Path(output)
    if output.is_dir():
        raise UsageError(f"{output} cannot be written: it is a directory")
    opened = open_bundle(bundle, check="quick")  # what that does not hash is hashed while it is read
    if output.resolve().is_relative_to(opened.path.resolve()):
        raise UsageError(f"{output} lies in the bundle itself; give a file outside of {bundle}")
    head, names = _manifest_bytes(opened, engines)
    aside = output.with_name(f".{output.name}.partial")
    try:
        with saying_where(output, output.parent), aside.open("wb") as file:
            hashed = _Hashing(file)
            with (
                zstandard.ZstdCompressor(level=level, write_checksum=True).stream_writer(
                    cast("IO[bytes]", hashed), closefd=False
                ) as zstd,
                tarfile.open(fileobj=zstd, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                tar.addfile(_member(MANIFEST, len(head)), io.BytesIO(head))
                for name in names:
                    with (opened.path / name).open("rb") as source:
                        checked = _Checked(source, opened.manifest.files[name], f"{opened.path}: {name}")
                        tar.addfile(_member(name, opened.manifest.files[name]["bytes"]), checked)
                        checked.end()
        with saying_where(output, output.parent):
            aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
    total = len(head) + sum(opened.manifest.files[name]["bytes"] for name in names)
    return Packed(output, hashed.digest.hexdigest(), hashed.count, total)


def unpack(archive: str | Path, output: str | Path, *, sha256: str | None = None, force: bool = False) -> Bundle:
    """Make a bundle of an archive that `pack` wrote; it is there whole or not at all.

    Args:
        archive: the file.
        output: the new bundle's directory.
        sha256: hex digest that the archive's bytes must have; None: the manifest's hashes alone are checked.
        force: replace the bundle that is at `output`.

    Returns:
        The new bundle, opened; every byte was compared with its manifest.

    Raises:
        UsageError: there is no such file, `output` exists and `force` is false, there is no space, or it cannot be
            written.
        BrokenBundleError: the file is no such archive, is not whole, holds something that its manifest does not name,
            or something else than its manifest or `sha256` says.
        MissingDependencyError: `zstandard` is not installed.
    """
    require_packages(("zstandard",), user="unpack", extra="archive")
    archive, output = Path(archive), Path(output)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UsageError(f"sha256 {sha256!r}: must be 64 hexadecimal digits")
    if not archive.is_file():
        raise UsageError(f"{archive} is not a file; give an archive that `doge-deploy pack` wrote")
    with writing_bundle(output, force=force) as place, archive.open("rb") as file:
        hashed = _Hashing(file)
        with _naming(archive):
            _extract(hashed, place, archive)
        while hashed.read(_CHUNK_BYTES):
            pass
        if sha256 is not None and hashed.digest.hexdigest() != sha256.lower():
            raise BrokenBundleError(f"{archive} has sha256 {hashed.digest.hexdigest()}, expected {sha256.lower()}")
        for folder in {path.parent for path in place.rglob("*")} - {place}:
            sync(folder)
    return Bundle(output, load_manifest(output))


def _extract(source: _Hashing, place: Path, archive: Path) -> None:
    """Write the members of an archive into the folder `place`, where nothing is yet."""
    import zstandard

    # these readers ask of a file nothing but `read`
    plain = zstandard.ZstdDecompressor().stream_reader(cast("IO[bytes]", source), closefd=False)
    budget = _Bounded(plain, archive)
    budget.allow(_MANIFEST_LIMIT_BYTES + _HEADERS_BYTES)
    with tarfile.open(fileobj=cast("IO[bytes]", budget), mode="r|") as tar:
        first = tar.next()
        if first is None or first.name != MANIFEST or not first.isreg() or first.size > _MANIFEST_LIMIT_BYTES:
            raise BrokenBundleError(f"{archive} is no archive of `doge-deploy pack`: it does not begin with {MANIFEST}")
        _copy(tar, first, place / MANIFEST, None, archive)
        files = _manifest(place, archive).files
        _check_space(place, files, archive)
        budget.allow(sum(entry["bytes"] + _HEADERS_BYTES for entry in files.values()))
        for member in _members(tar):
            entry = files.get(member.name)
            target = place / member.name
            if entry is None or not member.isreg():
                raise BrokenBundleError(f"{archive} holds {member.name!r}, which its manifest does not name")
            if target.exists():
                raise BrokenBundleError(f"{archive} holds {member.name} twice")
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(tar, member, target, entry, archive)
    budget.allow(_HEADERS_BYTES)
    while budget.read(_CHUNK_BYTES):  # to the end, where Zstandard's checksum is
        pass
    missing = [name for name in files if not (place / name).is_file()]
    if missing:
        raise BrokenBundleError(f"{archive} is not whole: {', '.join(missing)} is missing")


def _manifest(place: Path, archive: Path) -> Manifest:
    """The archive's manifest, and errors that name the archive rather than a folder that will be gone."""
    try:
        return load_manifest(place)
    except BrokenBundleError as error:
        raise BrokenBundleError(f"{archive}: {str(error).replace(f'{place}/', '')}") from error


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        yield member


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, entry: FileEntry | None, archive: Path) -> None:
    """Write one member to `target`, and compare it with its entry of the manifest."""
    data = tar.extractfile(member)
    assert data is not None  # of a regular file
    if entry is not None and member.size != entry["bytes"]:
        raise BrokenBundleError(
            f"{archive}: {member.name} was altered ({member.size} bytes, manifest says {entry['bytes']})"
        )
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while chunk := data.read(_CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    if entry is not None and digest.hexdigest() != entry["sha256"]:
        raise BrokenBundleError(f"{archive}: {member.name} was altered (its sha256 is not the manifest's)")


def _check_space(place: Path, files: Mapping[str, FileEntry], archive: Path) -> None:
    needed, free = sum(entry["bytes"] for entry in files.values()), shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(
            f"{archive} unpacks to {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free where it would go"
        )


@contextmanager
def _naming(archive: Path) -> Iterator[None]:
    """One line about the archive for whatever its readers raise about its bytes."""
    import zstandard

    try:
        yield
    except (tarfile.TarError, zstandard.ZstdError, EOFError, UnicodeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenBundleError(f"{archive} is no archive of `doge-deploy pack`, or is not whole: {reason}") from error


def _manifest_bytes(bundle: Bundle, engines: tuple[str, ...]) -> tuple[bytes, list[str]]:
    """The manifest of the archive, and the names of the files that go into it."""
    for name in engines:
        bundle.engine(name)  # raises where there is none of that name
    manifest = bundle.manifest
    if not engines:
        return (bundle.path / MANIFEST).read_bytes(), list(manifest.files)
    for name in manifest.engines:
        if name not in engines:
            manifest = remove(manifest, name)
    return manifest_bytes(manifest), list(manifest.files)


def _member(name: str, size: int) -> tarfile.TarInfo:
    """A regular file of a name and a size, and nothing of the machine that packs it."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


class _Hashing:
    """A file of which every byte that is written or read is hashed and counted."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.count = 0

    def write(self, data: ReadableBuffer) -> int:
        self.digest.update(data)
        self.count += len(memoryview(data))
        return self._file.write(data)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.count += len(data)
        return data

    def flush(self) -> None:
        self._file.flush()


class _Checked:
    """A file of the bundle that is packed; whether it changed since it was opened is known when it was read."""

    def __init__(self, file: IO[bytes], entry: FileEntry, name: str) -> None:
        self._file, self._entry, self._name = file, entry, name
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise BrokenBundleError(f"{self._name} was altered while it was packed; pack again")
        self._digest.update(data)
        return data

    def end(self) -> None:
        if self._digest.hexdigest() != self._entry["sha256"] or self._file.read(1):
            raise BrokenBundleError(f"{self._name} was altered while it was packed; pack again")


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Bounded:
    """What an archive decompresses to, up to what is allowed: a small file can be made to hold terabytes."""

    def __init__(self, file: _Readable, archive: Path) -> None:
        self._file, self._archive, self._left = file, archive, 0

    def allow(self, more: int) -> None:
        self._left += more

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise BrokenBundleError(f"{self._archive} holds more than its manifest says")
        return data
