"""The checks for runners on a GPU, run where there is none: on the stand-in engine and on the CPU provider.

So what they call exists, in the form in which they call it, and each of them can fail.
"""

from __future__ import annotations

from typing import Any

import device_checks as checks
import numpy as np
import pytest
from bundles import shared_bundle
from device_checks import CUDA, ENGINES, EngineCase
from sweeps import fixture_cases

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.errors import UsageError
from doge_deploy.options.build import BuildOptions
from doge_deploy.options.compatibility import resolve_max_length
from doge_deploy.runtime import cuda
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.trt.lowered import open_lowered
from doge_deploy.targets.trt.bounded.choices import window_of

BOUNDED = {name: case for name, case in ENGINES.items() if not case.max_length and not case.rounds_inputs}


@pytest.fixture(params=fixture_cases(BOUNDED, always=["bounded", "int4"]))
def engine(request: pytest.FixtureRequest) -> Bundle:
    case: EngineCase = request.param
    return open_bundle(shared_bundle(case.model, **case.export))


def stand_in(bundle: Bundle) -> Any:
    options = BuildOptions.model_validate({"batch_size": [1, 1, 2]})
    return open_lowered(bundle, bundle.layout("static"), options=options, threads=1)


def standard(bundle: Bundle) -> Any:
    return open_runner(bundle, "static", portable=True, threads=1)


def test_each_case_is_what_its_name_says() -> None:
    for name, case in ENGINES.items():
        facts = open_checkpoint(case.model).facts
        length = case.max_length or resolve_max_length(facts, None)
        assert window_of(facts, length, inlined=False) == (0 if "slot-for-each" in name else 64), name
        assert case.capability == {"fp8": "8.9", "nvfp4": "12.0"}.get(case.quantize, "")


def test_an_engine_follows_the_standard_graph(engine: Bundle) -> None:
    checks.follows(stand_in(engine), standard(engine), engine.manifest.dtype, tokens=40)
    checks.follows(stand_in(engine), standard(engine), engine.manifest.dtype, tokens=100)


def test_rows_stay_apart(engine: Bundle) -> None:
    checks.rows_stay_apart(stand_in(engine), engine.manifest.dtype)


def test_the_window_is_held(engine: Bundle) -> None:
    checks.holds_the_window(stand_in(engine), standard(engine), engine.manifest.dtype)


@pytest.mark.parametrize("case", fixture_cases(CUDA, always=["window-fp32", "int4-fp16"]))
def test_the_cuda_runner(case: tuple[str, dict[str, Any]]) -> None:
    model, options = case
    bundle = open_bundle(shared_bundle(model, **options))

    def own() -> Any:
        return cuda.open_runner(bundle, bundle.layout("static"), device="cpu")

    checks.follows(own(), standard(bundle), bundle.manifest.dtype, tokens=40)
    checks.rows_stay_apart(own(), bundle.manifest.dtype)


# Each can fail.


@pytest.fixture
def plain() -> Bundle:
    return open_bundle(shared_bundle("doge-tiny", dtype="fp16"))


def test_other_logits_are_found(plain: Bundle) -> None:
    runner = stand_in(plain)
    run = runner.run
    runner.run = lambda ids, *lengths: run(ids, *lengths) * np.float16(1.1)
    with pytest.raises(AssertionError, match="logits differ"):
        checks.follows(runner, standard(plain), "float16", tokens=40)


def test_a_row_that_is_taken_for_another_is_found(plain: Bundle) -> None:
    runner = stand_in(plain)
    run_rows = runner.run_rows
    runner.run_rows = lambda first, ids, lengths: run_rows(0, ids, lengths)
    with pytest.raises(AssertionError, match="not equal"):
        checks.rows_stay_apart(runner, "float16")


def test_a_window_of_the_latest_keys_is_found(plain: Bundle) -> None:
    runner = stand_in(plain)
    held = runner.held_positions

    def latest() -> dict[int, Any]:
        most = int(runner.row_lengths[0])
        return {
            layer: [np.tile(np.arange(most - runner.window, most), (len(row), 1)) for row in rows]
            for layer, rows in held().items()
        }

    runner.held_positions = latest
    with pytest.raises(AssertionError, match="others are better"):
        checks.holds_the_window(runner, standard(plain), "float16")


def test_a_batch_beyond_the_profile_is_refused(plain: Bundle) -> None:
    with pytest.raises(UsageError, match="no profile takes 3 rows"):
        checks.follows(stand_in(plain), standard(plain), "float16", tokens=10, rows=3)
