"""On a machine with a GPU: memory, streams and graphs of CUDA, and an engine from the build to the proof.

`make test-gpu` runs these.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.cli.main import run_command
from doge_deploy.errors import MissingDependencyError
from doge_deploy.options.build import Target
from doge_deploy.runtime.base import BundleRunner
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.trt import open_runner as open_engine
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


@pytest.fixture(scope="module", params=["trt-rtx", "trt"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Target]:
    """doge-tiny in fp16 with an engine for this GPU."""
    from bundles import own_bundle

    target: Target = request.param
    pytest.importorskip(PRODUCTS[target].module)
    path = own_bundle(tmp_path_factory.mktemp("built") / "doge-tiny", "doge-tiny", dtype="fp16")
    options = ["--batch-size", "1,1,2", *(["--no-plugins"] if target == "trt" else [])]
    assert run_command(["build", str(path), "--target", target, *options]) == 0
    return path, target


@pytest.mark.tensorrt
def test_an_engine_computes_what_transformers_computes(built: tuple[Path, Target]) -> None:
    path, target = built
    assert run_command(["verify", str(path), "--backend", target, "--greedy-steps", "32"]) == 0


@pytest.mark.tensorrt
def test_decode_steps_follow_onnx_runtime(built: tuple[Path, Target]) -> None:
    path, target = built
    bundle = open_bundle(path)
    runners: list[BundleRunner] = [open_engine(bundle, target), open_runner(bundle, "static", portable=True)]
    logits = []
    for runner in runners:
        runner.reset(2)
        steps = [runner.run(np.array([[5, 6, 7], [8, 9, 10]]))]
        steps += [runner.run(np.array([[token], [token + 1]])) for token in range(20, 36)]
        logits.append(np.concatenate(steps, axis=1).astype(np.float64))
    scale = np.abs(logits[1]).max()
    assert np.abs(logits[0] - logits[1]).max() < 2**-6 * scale, "16 units in the last place of fp16"


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
