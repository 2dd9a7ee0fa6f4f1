"""On a machine with a GPU and onnxruntime-gpu: bundles in the CUDA provider.

`nox -s on-gpu` runs these in an environment with that package; `make test-gpu` runs them too, and skips them where
ONNX Runtime has no CUDA provider.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import device_checks as checks
import onnxruntime
import pytest
from bundles import shared_bundle
from device_checks import CUDA

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.runtime import cuda
from doge_deploy.runtime.cuda.open import PROVIDER
from doge_deploy.runtime.ort import open_runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        PROVIDER not in onnxruntime.get_available_providers(),
        reason="ONNX Runtime has no CUDA provider here: nox -s on-gpu installs onnxruntime-gpu",
    ),
]


@pytest.fixture(params=CUDA.values(), ids=CUDA.keys())
def bundle(request: pytest.FixtureRequest) -> Path:
    model, options = request.param
    return shared_bundle(model, **options)


def test_it_computes_what_transformers_computes(bundle: Path) -> None:
    assert run_command(["verify", str(bundle), "--backend", "cuda", "--greedy-steps", "32"]) == 0


def test_it_follows_onnx_runtime_on_the_processor(bundle: Path) -> None:
    opened = open_bundle(bundle)

    def own() -> Any:
        return cuda.open_runner(opened, opened.layout("static"))

    checks.follows(own(), open_runner(opened, "static", portable=True), opened.manifest.dtype, tokens=40)
    checks.rows_stay_apart(own(), opened.manifest.dtype)


def test_text_is_generated(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--greedy", "--prompt", "A list is", "--max-new-tokens", "8"]
    assert run_command(["generate", str(bundle), *words, "--backend", "cuda"]) == 0
    on_device = capsys.readouterr().out
    assert run_command(["generate", str(bundle), *words, "--portable"]) == 0
    assert on_device.strip() and len(capsys.readouterr().out.strip())
