"""Which engine is taken, what speaks against one, and that the vendor's libraries have what is asked of them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_stand_ins import record_of, write_engine

from doge_deploy.bundle.engine_record import EngineRecord
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.devices.host import platform_name
from doge_deploy.doctor.probe import run_tool
from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.runtime.backend import open_backend
from doge_deploy.runtime.trt.device import open_device
from doge_deploy.runtime.trt.product import _make_log, choose_engine, engines_for, obstacle

VERSION = "1.7.1.116"


@pytest.fixture
def with_engines(tiny_bundle: Path) -> Callable[..., Bundle]:
    """The bundle with records of engines of these targets, by name."""
    bundle = open_bundle(tiny_bundle)

    def make(**targets: str) -> Bundle:
        engines = {name: record_of(bundle, target=target) for name, target in targets.items()}
        return Bundle(bundle.path, replace(bundle.manifest, engines=engines))

    return make


def test_the_engines_of_a_backend(with_engines: Callable[..., Bundle]) -> None:
    bundle = with_engines(a="trt-rtx", b="trt", c="trt-rtx")
    assert list(engines_for(bundle, "trt-rtx")) == ["a", "c"]
    assert list(engines_for(bundle, "trt-rtx", "c")) == ["c"]
    with pytest.raises(UsageError, match=r"engine b of .* is for --backend trt, not trt-rtx"):
        engines_for(bundle, "trt-rtx", "b")
    with pytest.raises(UsageError, match=r"has no trt engine; it holds a; make one with `doge-deploy build .* trt`"):
        engines_for(with_engines(a="trt-rtx"), "trt")
    with pytest.raises(UsageError, match=r"has no trt engine; make one"):
        engines_for(with_engines(), "trt")


@pytest.fixture
def record(tiny_bundle: Path) -> EngineRecord:
    return record_of(open_bundle(tiny_bundle), platform=platform_name())


OBSTACLES: dict[str, tuple[dict[str, Any], str | None]] = {
    "fits": ({}, None),
    "fits this capability": ({"compute_capabilities": ("8.6", "8.9")}, None),
    "platform": ({"platform": "windows-amd64"}, "was built on windows-amd64, this is"),
    "version": ({"version": "1.6.0"}, "was built with TensorRT-RTX 1.6.0, this is 1.7.1.116; build it again"),
    "capability": ({"compute_capabilities": ("12.0",)}, "was built for compute capability 12.0, this GPU has 8.9"),
    "stripped": ({"strip_weights": True}, "has no weights"),
}


@pytest.mark.parametrize(("changes", "reason"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_obstacle(record: EngineRecord, changes: dict[str, Any], reason: str | None) -> None:
    found = obstacle(record.model_copy(update=changes), "8.9", VERSION)
    assert found is None if reason is None else found is not None and reason in found


def test_the_engine_that_fits_is_chosen(record: EngineRecord) -> None:
    ada, blackwell = (record.model_copy(update={"compute_capabilities": (one,)}) for one in ("8.9", "12.0"))
    assert choose_engine(Path("b"), {"ada": ada, "blackwell": blackwell}, "12.0", VERSION) == "blackwell"
    with pytest.raises(UsageError, match="several engines for this GPU, name one with --engine: x, y"):
        choose_engine(Path("b"), {"x": ada, "y": ada}, "8.9", VERSION)
    with pytest.raises(MissingDependencyError, match=r"no engine of b runs here: ada: .* 8.9, this .*; blackwell: "):
        choose_engine(Path("b"), {"ada": ada, "blackwell": blackwell}, "8.6", VERSION)


@pytest.mark.parametrize(("backend", "extra"), [("trt", "trt"), ("trt-rtx", "rtx")])
def test_without_a_gpu_the_remedy_is_named(
    backend: str, extra: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if run_tool(["nvidia-smi", "-L"]):
        pytest.skip("a GPU is here")
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, path)
    write_engine(path, target=backend, platform=platform_name())
    assert run_command(["generate", str(path), "--prompt", "x", "--backend", backend]) == 4
    message = capsys.readouterr().err
    assert "cuda.core cannot be loaded" in message or "no CUDA device" in message
    assert f"doge-deploy[{extra}]" in message or "doge-deploy doctor" in message


def test_without_cuda_core_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingDependencyError, match=r"cuda.core cannot be loaded .*pip install 'doge-deploy\[rtx\]'"):
        open_device("rtx")


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["verify"]], ids=["generate", "verify"])
def test_a_bundle_without_engines_says_how_to_make_one(
    command: list[str], tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([command[0], str(tiny_bundle), *command[1:], "--backend", "trt-rtx"]) == 2
    assert f"has no trt-rtx engine; make one with `doge-deploy build {tiny_bundle} --target trt-rtx`" in (
        capsys.readouterr().err
    )


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "engine": ({"engine": "a"}, "--engine belongs to --backend trt or trt-rtx; ort does not take it"),
    "portable": ({"backend": "trt", "portable": True}, "--portable belongs to --backend ort; trt does not take it"),
    "threads": ({"backend": "trt", "threads": 2}, "--threads belongs to --backend ort"),
    "layout": ({"backend": "trt", "layout": "growing"}, "--layout growing belongs to --backend ort; trt runs static"),
}


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options_of_another_backend(options: dict[str, Any], words: str, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=words):
        open_backend(open_bundle(tiny_bundle), **options)


NEEDED = {
    "Runtime": ["deserialize_cuda_engine"],
    "ICudaEngine": ["device_memory_size_v2", "create_execution_context"],
    "IExecutionContext": [
        "active_optimization_profile",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "set_device_memory",
        "execute_async_v3",
    ],
    "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
}
NEEDED_OF_RTX = {
    "ICudaEngine": ["create_runtime_config", "get_aliased_input_tensor"],
    "IRuntimeConfig": ["set_execution_context_allocation_strategy", "cuda_graph_strategy"],
    "CudaGraphStrategy": ["WHOLE_GRAPH_CAPTURE"],
}


@pytest.mark.tensorrt
@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
def test_the_library_has_what_is_asked_of_it(module: str) -> None:
    """A contract with the vendor's bindings, as far as they go without a GPU."""
    trt = pytest.importorskip(module)
    for name, members in [*NEEDED.items(), *(NEEDED_OF_RTX.items() if module == "tensorrt_rtx" else ())]:
        missing = [member for member in members if not hasattr(getattr(trt, name), member)]
        assert not missing, f"{module}.{name} lacks {missing}"


@pytest.mark.tensorrt
@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
def test_the_log_keeps_errors_and_no_more(module: str) -> None:
    trt = pytest.importorskip(module)
    log = _make_log(trt)
    assert log.last() == "it does not say why"
    log.log(trt.ILogger.ERROR, "one\n  two")
    log.log(trt.ILogger.INFO, "three")
    assert log.last() == "one two"
