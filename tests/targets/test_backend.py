"""The registry of backends, and a backend of another package: one file and one entry point."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle, shared_bundle
from pretend_machines import machine, rtx_machine

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.devices.facts import device_configs
from doge_deploy.doctor.commands import CommandStatus, commands
from doge_deploy.doctor.deployment_options import DeploymentOption, deployment_options
from doge_deploy.doctor.machine import Machine
from doge_deploy.doctor.model import open_model
from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.targets import backend as registry
from doge_deploy.targets.backend import (
    GROUP,
    Backend,
    Library,
    SessionOptions,
    backends,
    check_name,
    find,
    names,
    unique,
)
from doge_deploy.targets.deployment import DeployableModel, Obstacle

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
        check_name("trt")


def test_the_default_is_the_one_that_its_entry_point_names() -> None:
    (entry,) = [entry for entry in entry_points(group=GROUP) if entry.name == DEFAULT_BACKEND]
    assert check_name(DEFAULT_BACKEND) == DEFAULT_BACKEND
    assert find(DEFAULT_BACKEND) is entry.load() and find(DEFAULT_BACKEND).name == DEFAULT_BACKEND


def test_hints_need_no_backend_that_takes_them() -> None:
    class Plain(Backend[None]):
        name = "plain"

        def open(self, *arguments: Any, **options: Any) -> None:
            return None

    Plain().check_options(SessionOptions(flush_denormals=True))
    for name in ("threads", "spin"):
        with pytest.raises(UsageError, match=f"--{name} belongs to --backend ort; plain does not take it"):
            Plain().check_options(SessionOptions(**{name: 2}))


def test_a_layout_that_a_backend_does_not_run(register: Register, tiny_bundle: Path, tmp_path: Path) -> None:
    register(toy="toy_backend:BACKEND")
    bundle = open_bundle(tiny_bundle)
    assert find("toy").choose_layout(bundle).file == "model.growing.onnx", "the first that it runs, not the first"
    with pytest.raises(
        UsageError, match="--layout static belongs to --backend ort or cuda or trt or trt-rtx; toy runs growing"
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
        "growing": {"ort", "toy"},
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


def test_the_toy_is_in_doctors_rows(toy_path: Path, small_bundle: Path) -> None:
    """With what its class says and nothing more: its library is looked for, and every device is asked about it."""
    here = json.loads(doge_deploy(toy_path, "doctor", "--json").stdout)
    row = next(row for row in here["targets"] if row["name"] == "generate --backend toy")
    version = importlib.metadata.version("onnx")
    assert row["usable"] and row["reason"] == f"onnx {version}"
    assert here["machine"]["libraries"]["onnx"]["version"] == version
    assert not [row for row in here["targets"] if row["name"] == "build --target toy"]
    assert "generate --backend toy" in doge_deploy(toy_path, "doctor").stdout

    devices = ("--target", "cpu", "--target", "h100")
    there = json.loads(doge_deploy(toy_path, "doctor", small_bundle, *devices, "--json").stdout)
    for device in there["devices"]:
        found = {option["backend"]: option for option in device["deployment_options"]}
        assert (found["toy"]["lowering"], found["toy"]["dtype"]) == ("standard", "fp32")
        assert found["toy"]["usable"] and found["toy"]["needs"] == found["ort"]["needs"]


def test_doctor_says_why_the_toy_cannot_be_used(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_backend

    register(toy="toy_backend:BACKEND")
    name = "generate --backend toy"
    assert status(machine(), name) == CommandStatus(name, False, "no onnx", "pip install 'doge-deploy[graph]'")
    library = Library("onnx", "graph", first_version="1.20", title="ONNX")
    monkeypatch.setattr(toy_backend.Toy, "libraries", (library,))
    assert status(machine(versions={"onnx": "1.20"}), name).usable
    assert status(machine(versions={"onnx": "1.9"}), name).reason == "ONNX 1.9 is older than 1.20"
    monkeypatch.setattr(toy_backend.Toy, "needs_gpu", True)
    assert status(machine(versions={"onnx": "1.20"}), name).reason == "no NVIDIA driver"
    assert status(rtx_machine(versions={"onnx": "1.20"}), name).usable
    obstacle = Obstacle("too new", "an older one")
    monkeypatch.setattr(toy_backend.Toy, "gpu_obstacle", lambda self, found: obstacle if "8.9" in found else None)
    assert status(rtx_machine(versions={"onnx": "1.20"}), name).remedy == "an older one"


def test_doctor_asks_the_toy_about_a_device(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_backend

    register(toy="toy_backend:BACKEND")
    devices = {name: config.facts for name, config in device_configs().items()}
    tiny = open_model("doge-tiny")

    def toy(device: str, model: DeployableModel | None = tiny) -> DeploymentOption:
        return next(one for one in deployment_options(devices[device], model) if one.backend == "toy")

    assert toy("cpu").usable and toy("h100").usable
    static = toy("cpu", replace(tiny, name="b", layouts=("static",)))
    assert static.reason == "b holds static, and toy runs growing" and static.remedy
    monkeypatch.setattr(toy_backend.Toy, "build_bytes", lambda self, weights: 10**12)
    assert toy("jetson-agx-thor").reason.startswith("fits, but its build may take 931")
    monkeypatch.setattr(toy_backend.Toy, "device_obstacles", lambda self, device, dtype: [Obstacle("no", "another")])
    assert (toy("h100").reason, toy("h100").remedy) == ("no", "another")
    monkeypatch.setattr(toy_backend.Toy, "needs_gpu", True)
    assert not [one for one in deployment_options(devices["cpu"], tiny) if one.backend == "toy"]


def test_a_backend_that_cannot_be_imported_is_a_row_of_doctors(register: Register) -> None:
    register(gone="a_module_that_is_not_there:BACKEND")
    found = status(machine(), "generate --backend gone")
    assert not found.usable and "cannot be loaded from a_module_that_is_not_there" in found.reason and found.remedy
    assert status(machine(), "generate --backend ort").usable


def status(of: Machine, name: str) -> CommandStatus:
    return next(row for row in commands(of) if row.name == name)


BACKEND_FOLDERS = ("runtime/cuda", "runtime/ort", "runtime/trt", "targets/cuda", "targets/ort", "targets/trt")
ONE_BACKEND = {"bundle/version_1.py"}
"""Reads manifests of the time when ONNX Runtime was the only one that a graph was lowered for."""


def compared_names(source: str) -> list[int]:
    """Lines where something is compared with the name of a backend of this package."""
    named = {"ort", "trt", "trt-rtx"}
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        for part in (node.left, *node.comparators)
        for one in ast.walk(part)
        if isinstance(one, ast.Constant) and one.value in named
    ]


def test_no_backend_is_asked_for_by_its_name() -> None:
    """What depends on a backend is the backend's to say; one of another package has no place in such a comparison."""
    assert compared_names('if a == "ort":\n    pass\nb = c in ("trt", d) or "trt-rtx" != e') == [1, 3, 3]
    package = TESTS.parent / "doge_deploy"
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(BACKEND_FOLDERS) and name not in ONE_BACKEND:
            found += [f"{name}:{line}" for line in compared_names(path.read_text(encoding="utf-8"))]
    assert not found
