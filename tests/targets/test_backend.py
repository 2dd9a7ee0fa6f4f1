"""The registry of backends, and a backend of another package: one file and one entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle, shared_bundle

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.targets import backend as registry
from doge_deploy.targets.backend import GROUP, Backend, SessionOptions, backends, check_name, find, names, unique

TESTS = Path(__file__).parent.parent

Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    """Add entry points, `name="module:attribute"`, to those that are installed."""
    original = registry.entry_points
    added: list[EntryPoint] = []

    def all_of_them(group: str) -> Any:
        return [*original(group=group), *added]

    def add(**entries: str) -> None:
        added.extend(EntryPoint(name, value, GROUP) for name, value in entries.items())
        registry.forget()

    monkeypatch.setattr(registry, "entry_points", all_of_them)
    yield add
    registry.forget()


@pytest.fixture(scope="session")
def small_bundle() -> Path:
    return shared_bundle("doge-tiny", kv_cache=("growing",), num_layers=1, max_length=48)


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which a package that brings the toy is installed, as pip leaves one."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_backend.py").write_text((TESTS / "toy_backend.py").read_text())
    information = folder / "doge_toy-1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: doge-toy\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text("[doge_deploy.backends]\ntoy = toy_backend:BACKEND\n")
    return folder


def doge_deploy(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with `path` before everything that is installed."""
    return subprocess.run(
        [sys.executable, "-m", "doge_deploy.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_names_are_known_without_loading_anything() -> None:
    code = f"""
import sys
from doge_deploy.targets.backend import names
assert names() == {names()!r}
loaded = {{name for name in sys.modules if name.startswith(("doge_deploy.runtime", "onnxruntime", "numpy"))}}
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_default_comes_first() -> None:
    assert names()[0] == "ort" and set(names()) >= {"ort", "trt", "trt-rtx"}
    assert [backend.name for backend in backends()] == list(names())


@pytest.mark.parametrize(
    "command", [["generate", "b", "--prompt", "x"], ["verify", "b"], ["bench", "b"]], ids=lambda c: c[0]
)
def test_an_unknown_name_is_one_line_with_the_nearest(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*command, "--backend", "tr-rtx"]) == 2
    message = capsys.readouterr().err
    assert "unknown backend 'tr-rtx' (did you mean 'trt-rtx'?); known: ort, " in message and message.count("\n") == 1


def test_a_backend_that_cannot_be_imported_is_one_line(
    register: Register, small_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(gone="a_module_that_is_not_there:BACKEND", wrong="pathlib:Path", other="toy_backend:BACKEND")
    arguments = ["generate", str(small_bundle), "--prompt", "x", "--backend"]
    for name, words in {
        "gone": "backend 'gone' of a_module_that_is_not_there:BACKEND cannot be loaded from a_module_that_is_not_there",
        "wrong": "backend 'wrong' of pathlib:Path: pathlib:Path is a type, must be a Backend called 'wrong'",
        "other": "toy_backend:BACKEND is a Toy called 'toy', must be a Backend called 'other'",
    }.items():
        assert run_command([*arguments, name]) == 4
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    assert find("ort").name == "ort", "the others are not harmed"
    with pytest.raises(UsageError, match="--engine belongs to --backend trt or trt-rtx; ort does not take it"):
        find("ort").check_options(SessionOptions(engine="a"))


def test_two_packages_with_one_name() -> None:
    entries = [EntryPoint("toy", "toy_backend:BACKEND", GROUP), EntryPoint("toy", "another:BACKEND", GROUP)]
    assert list(unique([entries[0], entries[0]])) == ["toy"], "found twice is not brought twice"
    with pytest.raises(UsageError, match="backend 'toy' is brought by toy_backend:BACKEND and by another:BACKEND"):
        unique(entries)


def test_an_installation_without_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict)
    with pytest.raises(MissingDependencyError, match="no backend is registered"):
        check_name("ort")


def test_hints_need_no_backend_that_takes_them() -> None:
    class Plain(Backend[None]):
        name = "plain"

        def open(self, *arguments: Any, **options: Any) -> None:
            return None

    Plain().check_options(SessionOptions(flush_denormals=True, spin=False))
    with pytest.raises(UsageError, match="--threads belongs to --backend ort; plain does not take it"):
        Plain().check_options(SessionOptions(threads=2))


def test_a_layout_that_a_backend_does_not_run(register: Register, tiny_bundle: Path, tmp_path: Path) -> None:
    register(toy="toy_backend:BACKEND")
    bundle = open_bundle(tiny_bundle)
    assert find("toy").choose_layout(bundle).file == "model.growing.onnx", "the first that it runs, not the first"
    with pytest.raises(
        UsageError, match="--layout static belongs to --backend ort or trt or trt-rtx; toy runs growing"
    ):
        find("toy").choose_layout(bundle, "static")
    with pytest.raises(UsageError, match="has no 'uncached' layout; it holds: static, growing"):
        find("ort").choose_layout(bundle, "uncached")
    static = open_bundle(shared_bundle("doge-tiny", num_layers=1, max_length=48))
    with pytest.raises(UsageError, match="holds static, and toy runs growing: export with --kv-cache growing"):
        find("toy").choose_layout(static)


def test_what_a_backend_lowers_is_in_the_bundle(
    register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_backend

    from doge_deploy.bundle.manifest import Layout, Lowered

    def lower(self: Any, directory: Path, layout: Layout) -> Lowered:
        (directory / "model.toy.txt").write_text("lowered")
        return Lowered("model.toy.txt", ("Nothing",))

    monkeypatch.setattr(toy_backend.Toy, "lowers", ("growing",))
    monkeypatch.setattr(toy_backend.Toy, "lower", lower)
    register(toy="toy_backend:BACKEND")
    path = make_bundle("doge-tiny", tmp_path / "bundle", kv_cache=("static", "growing"), num_layers=1, max_length=48)
    manifest = open_bundle(path).manifest
    assert {name: set(layout.lowered) for name, layout in manifest.layouts.items()} == {
        "static": {"ort"},
        "growing": {"toy"},
    }
    assert "model.toy.txt" in manifest.files


def test_the_toy_verifies(register: Register, small_bundle: Path, tmp_path: Path) -> None:
    register(toy="toy_backend:BACKEND")
    report = tmp_path / "report.json"
    assert (
        run_command(["verify", str(small_bundle), "--backend", "toy", "--greedy-steps", "70", "--json", str(report)])
        == 0
    )
    data = json.loads(report.read_text())
    assert len(data["cases"]) >= 5 and "more than 60 calls" not in str(data["cases"])


def test_a_wrong_toy_is_found_out(
    register: Register, small_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import toy_backend

    right = toy_backend.ToyRunner._run
    monkeypatch.setattr(toy_backend.ToyRunner, "_run", lambda *arguments: right(*arguments) * 1.001)
    register(toy="toy_backend:BACKEND")
    assert run_command(["verify", str(small_bundle), "--backend", "toy", "--greedy-steps", "2"]) == 1
    assert "growing/prefill" in capsys.readouterr().err


def test_the_toy_is_installed_and_generates(toy_path: Path, small_bundle: Path) -> None:
    """The same text as ONNX Runtime's, in processes that know of it by its entry point alone."""
    arguments = ("generate", small_bundle, "--prompt", "The", "--greedy", "--max-new-tokens", "6", "--quiet")
    mine, theirs = doge_deploy(toy_path, *arguments, "--backend", "toy"), doge_deploy(toy_path, *arguments)
    assert mine.returncode == theirs.returncode == 0, mine.stderr + theirs.stderr
    assert mine.stdout == theirs.stdout and len(mine.stdout) > 1
    assert "toy" in doge_deploy(toy_path, "generate", "--help").stdout


def test_the_toy_is_timed_in_a_worker_process(toy_path: Path, small_bundle: Path, tmp_path: Path) -> None:
    options = ("--prompt-length", "4", "--decode-steps", "2", "--rounds", "1", "--loads", "1", "--threads", "1")
    report = tmp_path / "bench.json"
    backends = ("--backend", "toy", "--backend", "ort")
    result = doge_deploy(toy_path, "bench", small_bundle, *backends, *options, "--json", report)
    assert result.returncode == 0, result.stderr
    candidates = json.loads(report.read_text())["results"][0]["measurements"]
    assert len(candidates) == 2
