"""Archives: the same bundle comes back, and nothing else is ever written."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from engine_stand_ins import write_engine

from doge_deploy.bundle.archive import Packed, pack, unpack
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import BrokenBundleError, DogeDeployError, UsageError

Members = list[tuple[tarfile.TarInfo, bytes]]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("archive") / "bundle"))
    write_engine(path)
    return path


@pytest.fixture(scope="module")
def packed(bundle: Path) -> Packed:
    return pack(bundle, bundle.parent / "good.tar.zst", level=1)


@pytest.fixture
def members(packed: Packed) -> Members:
    plain = zstandard.ZstdDecompressor().stream_reader(packed.path.read_bytes()).read()
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]


def written(members: Members, path: Path) -> Path:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(plain.getvalue()))
    return path


def test_a_bundle_comes_back_with_its_engine(bundle: Path, packed: Packed, tmp_path: Path) -> None:
    made = unpack(packed.path, tmp_path / "deep" / "back", sha256=packed.sha256.upper())
    assert files_of(made.path) == files_of(bundle)
    assert made.manifest == open_bundle(made.path).manifest and made.manifest.engines
    assert packed.bundle_bytes == sum(map(len, files_of(bundle).values())) > packed.bytes
    assert hashlib.sha256(packed.path.read_bytes()).hexdigest() == packed.sha256
    assert packed.bytes == packed.path.stat().st_size


def test_the_same_bundle_gives_the_same_file_wherever_it_lies(bundle: Path, packed: Packed, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other", copy_function=shutil.copy))
    (other / "manifest.json").touch()
    assert pack(other, tmp_path / "again", level=1).sha256 == packed.sha256


def test_some_engines_or_all(bundle: Path, tmp_path: Path) -> None:
    name = next(iter(open_bundle(bundle).manifest.engines))
    both = Path(shutil.copytree(bundle, tmp_path / "both"))
    other = Path(write_engine(both, target="trt").directory).name
    only = unpack(pack(both, tmp_path / "only", engines=(name,)).path, tmp_path / "back")
    assert list(only.manifest.engines) == [name]
    assert open_bundle(only.path).manifest == only.manifest
    assert not (only.path / "engines" / other).exists()
    with pytest.raises(UsageError, match="no engine x; it holds"):
        pack(both, tmp_path / "none", engines=("x",))
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(shutil.which("zstd") is None, reason="no zstd here, which GNU tar calls")
def test_tar_opens_it(bundle: Path, packed: Packed, tmp_path: Path) -> None:
    subprocess.run(["tar", "--zstd", "-xf", packed.path, "-C", tmp_path], check=True)
    assert files_of(tmp_path) == files_of(bundle)


def named(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def add(member: tarfile.TarInfo) -> Callable[[Members], Members]:
    return lambda members: [*members, (member, b"")]


def change_manifest(edit: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        document = json.loads(members[0][1])
        edit(document["files"])
        data = json.dumps(document).encode()
        members[0][0].size = len(data)
        return [(members[0][0], data), *members[1:]]

    return change


def other_bytes(members: Members) -> Members:
    member, data = members[-1]
    return [*members[:-1], (member, bytes(len(data)))]


def shorter(members: Members) -> Members:
    member, data = members[-1]
    member.size = len(data) - 1
    return [*members[:-1], (member, data[:-1])]


def longer_header(members: Members) -> Members:
    member, data = members[-1]
    member.pax_headers = {"comment": "x" * 80_000_000}
    return [*members[:-1], (member, data)]


BAD: dict[str, tuple[Callable[[Members], Members], str]] = {
    "up": (add(named("../up")), "'../up', which its manifest does not name"),
    "absolute": (add(named("/tmp/doge-absolute")), "which its manifest does not name"),
    "symbolic-link": (add(named("weights", tarfile.SYMTYPE, "/etc/passwd")), "which its manifest does not name"),
    "hard-link": (add(named("model.onnx", tarfile.LNKTYPE, "manifest.json")), "'model.onnx', which its manifest does"),
    "link-in-place": (
        lambda members: [*members[:-1], (named(members[-1][0].name, tarfile.SYMTYPE, "/etc/passwd"), b"")],
        "which its manifest does not name",
    ),
    "device": (add(named("null", tarfile.CHRTYPE)), "'null', which its manifest does not name"),
    "folder": (add(named("engines", tarfile.DIRTYPE)), "'engines', which its manifest does not name"),
    "twice": (lambda members: [*members, members[-1]], "twice"),
    "manifest-twice": (lambda members: [*members, members[0]], "'manifest.json', which its manifest does not name"),
    "missing": (lambda members: members[:-1], "is not whole: "),
    "no-manifest": (lambda members: members[1:], "it does not begin with manifest.json"),
    "empty": (lambda members: [], "it does not begin with manifest.json"),
    "other-bytes": (other_bytes, "was altered (its sha256 is not the manifest's)"),
    "shorter": (shorter, "manifest says"),
    "header": (longer_header, "holds more than its manifest says"),
    "space": (change_manifest(lambda files: files["model.onnx"].update(bytes=10**18)), "MB are free where it would go"),
    "name": (change_manifest(lambda files: files.update({"../x": files["model.onnx"]})), "stays inside the bundle"),
    "not-json": (lambda members: [(members[0][0], b"{" + bytes(members[0][0].size - 1)), *members[1:]], "valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_is_refused_in_one_line_and_leaves_nothing(name: str, members: Members, tmp_path: Path) -> None:
    change, message = BAD[name]
    archive = written(change(members), tmp_path / "bad.tar.zst")
    with pytest.raises(DogeDeployError) as caught:
        unpack(archive, tmp_path / "in" / "back")
    text = str(caught.value)
    assert message in text and str(archive) in text and "\n" not in text and ".partial" not in text
    assert list(tmp_path.iterdir()) == [archive]


def test_every_cut_is_refused(packed: Packed, tmp_path: Path) -> None:
    whole = packed.path.read_bytes()
    archive = tmp_path / "cut"
    for length in (0, 1, 4, 100, len(whole) // 2, len(whole) - 2000):
        archive.write_bytes(whole[:length])
        with pytest.raises(BrokenBundleError, match=r"is no archive of `doge-deploy pack`|is not whole"):
            unpack(archive, tmp_path / "back")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("place", [3, 0.3, 0.6, 0.9])
def test_a_changed_byte_is_refused(packed: Packed, tmp_path: Path, place: float) -> None:
    data = bytearray(packed.path.read_bytes())
    data[int(place * len(data)) if place < 1 else int(place)] ^= 1
    archive = tmp_path / "changed"
    archive.write_bytes(data)
    with pytest.raises(BrokenBundleError, match=str(archive)):
        unpack(archive, tmp_path / "back")
    assert list(tmp_path.iterdir()) == [archive]


def test_a_file_that_is_altered_is_not_packed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "model.onnx").write_bytes(bytes((copy / "model.onnx").stat().st_size))
    with pytest.raises(BrokenBundleError, match=r"model\.onnx was altered"):
        pack(copy, tmp_path / "x")
    # what a quick check does not hash is hashed while it is read
    monkeypatch.setattr("doge_deploy.bundle.files.QUICK_LIMIT_BYTES", 0)
    with pytest.raises(BrokenBundleError, match=r"model\.onnx was altered while it was packed"):
        pack(copy, tmp_path / "x")
    assert list(tmp_path.iterdir()) == [copy]


def test_commands(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, back = str(tmp_path / "a.tar.zst"), str(tmp_path / "back")
    assert run_command(["pack", str(bundle), "-o", archive]) == 0
    digest = capsys.readouterr().out.split()[-1]
    assert run_command(["unpack", archive, "-o", back, "--sha256", digest]) == 0
    assert "every sha256 as in the manifest" in capsys.readouterr().out
    assert run_command(["unpack", archive, "-o", back]) == 2
    assert "exists; choose another --output, or replace it with --force" in capsys.readouterr().err
    assert run_command(["unpack", archive, "-o", back, "--sha256", "0" * 64, "--force"]) == 3
    assert f"has sha256 {digest}, expected {'0' * 64}" in capsys.readouterr().err
    assert run_command(["unpack", archive, "-o", back, "--force"]) == 0
    for line, message in (
        (["unpack", archive, "-o", back, "--sha256", "x"], "sha256 'x': must be 64 hexadecimal digits"),
        (["unpack", "nothing", "-o", back], "nothing is not a file; give an archive that `doge-deploy pack` wrote"),
        (["pack", str(bundle), "-o", archive, "--level", "23"], "level 23: must be 1 to 22"),
        (["pack", str(bundle), "-o", str(bundle / "x")], "lies in the bundle itself"),
        (["pack", str(bundle), "-o", str(tmp_path)], "it is a directory"),
        (["pack", str(bundle), "-o", str(tmp_path / "no" / "x")], "cannot be written"),
        (["pack", "nothing", "-o", archive], "nothing is not a directory"),
    ):
        capsys.readouterr()
        assert run_command(line) == 2
        assert message in (text := capsys.readouterr().err) and len(text.splitlines()) == 1
