"""On a machine with a GPU: memory, streams and graphs of CUDA, and an engine from the build to the proof.

`make test-gpu` runs these.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import device_checks as checks
import numpy as np
import pytest
from device_checks import BUILD, ENGINES, EngineCase

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.cli.main import run_command
from doge_deploy.devices.versions import at_least
from doge_deploy.errors import MissingDependencyError
from doge_deploy.options.build import Target
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.trt import open_runner as open_engine
from doge_deploy.runtime.trt.bounded import BoundedTrtRunner
from doge_deploy.runtime.trt.device import CudaDevice, open_device
from doge_deploy.targets.trt.vendor import PRODUCTS

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    pytest.importorskip("cuda.core")
    yield open_device("rtx")


def test_memory_is_zero_and_keeps_what_is_copied(device: CudaDevice) -> None:
    memory, there, back = device.allocate(1000), device.allocate_host(1000), device.allocate_host(1000)
    back.array[:] = 7
    device.download(memory, back)
    device.synchronize()
    assert not back.array.any()
    there.array[:] = np.arange(1000) % 251
    device.upload(there, memory)
    device.download(memory, back)
    device.synchronize()
    np.testing.assert_array_equal(back.array, there.array)


def test_recorded_copies_are_done_when_they_are_launched(device: CudaDevice) -> None:
    memory, there, back = device.allocate(64), device.allocate_host(64), device.allocate_host(64)
    back.array[:] = 0

    def work() -> None:
        device.upload(there, memory)
        device.download(memory, back)

    graph = device.record(work)
    device.synchronize()
    assert not back.array.any(), "recorded, not done"
    for value in (3, 4):
        there.array[:] = value
        graph.launch()
        device.synchronize()
        assert (back.array == value).all()


def test_what_does_not_fit_is_one_line(device: CudaDevice) -> None:
    with pytest.raises(MissingDependencyError, match="cannot give"):
        device.allocate(1 << 50)


def _built(case: EngineCase, target: Target, folder: Path) -> Path:
    """A bundle with an engine for this GPU; skips where there can be none."""
    from bundles import own_bundle

    pytest.importorskip(PRODUCTS[target].module)
    here = open_device("rtx").compute_capability
    if case.capability and not at_least(here, case.capability):
        pytest.skip(f"engines of {case.quantize} weights need compute capability {case.capability}; this is {here}")
    path = own_bundle(folder / "bundle", case.model, **case.export)
    assert run_command(["build", str(path), "--target", target, "--batch-size", "1,1,2", *BUILD[target]]) == 0
    return path


TARGETS: tuple[Target, ...] = ("trt-rtx", "trt")


@pytest.fixture(scope="module", params=TARGETS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Target]:
    """doge-tiny in fp16 with an engine whose cache is bounded."""
    return _built(ENGINES["bounded"], request.param, tmp_path_factory.mktemp("built")), request.param


@pytest.fixture(
    scope="module",
    params=[(name, target) for target in TARGETS for name in ENGINES],
    ids=[f"{target}-{name}" for target in TARGETS for name in ENGINES],
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineCase, Path, Target]:
    """Each case with its engine."""
    name, target = request.param
    return ENGINES[name], _built(ENGINES[name], target, tmp_path_factory.mktemp("engine")), target


@pytest.mark.tensorrt
def test_an_engine_computes_what_transformers_computes(engine: tuple[EngineCase, Path, Target]) -> None:
    """With weights of few bits their quality is judged too."""
    _, path, target = engine
    assert run_command(["verify", str(path), "--backend", target, "--greedy-steps", "32"]) == 0


@pytest.mark.tensorrt
def test_decode_steps_follow_onnx_runtime(engine: tuple[EngineCase, Path, Target]) -> None:
    case, path, target = engine
    if case.rounds_inputs:
        pytest.skip("its products round their inputs, so that its logits are others; `verify` judges them")
    bundle = open_bundle(path)
    standard = open_runner(bundle, "static", portable=True)
    for tokens in (30, *(() if case.max_length else (100,))):
        checks.follows(open_engine(bundle, target), standard, bundle.manifest.dtype, tokens=tokens)
    checks.rows_stay_apart(open_engine(bundle, target), bundle.manifest.dtype)


@pytest.mark.tensorrt
def test_a_bounded_cache_holds_the_best_keys(engine: tuple[EngineCase, Path, Target]) -> None:
    case, path, target = engine
    if case.rounds_inputs or case.max_length:
        pytest.skip("its scores are others" if case.rounds_inputs else "it has a slot for each token")
    bundle = open_bundle(path)
    runner = open_engine(bundle, target)
    assert isinstance(runner, BoundedTrtRunner)
    checks.holds_the_window(runner, open_runner(bundle, "static", portable=True), bundle.manifest.dtype)


@pytest.mark.tensorrt
def test_text_is_generated(built: tuple[Path, Target], capsys: pytest.CaptureFixture[str]) -> None:
    path, target = built
    arguments = [
        "generate",
        str(path),
        "--greedy",
        "--prompt",
        "A list is",
        "--max-new-tokens",
        "8",
        "--backend",
        target,
    ]
    assert run_command(arguments) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.tensorrt
def test_an_engine_of_another_version_is_refused(
    built: tuple[Path, Target], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = built
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    bundle = open_bundle(copy)
    old = {name: record.model_copy(update={"version": "0.1"}) for name, record in bundle.manifest.engines.items()}
    write_manifest(copy, replace(bundle.manifest, engines=old))
    assert run_command(["generate", str(copy), "--prompt", "x", "--backend", target]) == 4
    assert "0.1, this is" in capsys.readouterr().err
