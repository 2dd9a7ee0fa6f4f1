"""Fixtures that several test files share, and reasons to skip what this machine cannot run."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import shared_files
from hypothesis import HealthCheck, settings

from doge_deploy.doctor.probe import run_tool

# Workers share the cores, so each computes with one thread; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton decides when it is imported whether kernels are interpreted, and torch may import it at any time.
# `make test-gpu` sets TRITON_INTERPRET=0 and runs the tests that are marked `gpu` on the device.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests leave nothing in the user's cache; those of the cache itself choose a folder.
os.environ.setdefault("DOGE_DEPLOY_GRAPH_CACHE", "off")

# Tests that run in the background of a shell have an ignored Ctrl-C, and so would have what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A busy machine takes as long as it takes for an example.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


collect_ignore = ["page"]
"""Its session of nox has a browser and settings of its own."""


@pytest.fixture(scope="session", autouse=True)
def _shared_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Name the folder that `shared_files` uses, and complain at the end if a test wrote into what all share."""
    base = tmp_path_factory.getbasetemp()
    # the folder of a worker lies in that of the session
    of_session = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    # planted_faults.py has many sessions one after another
    shared_files.use_folder(Path(os.environ.get("DOGE_DEPLOY_TESTS_SHARED", of_session)))
    yield
    changed = shared_files.changed_files()
    assert not changed, f"tests wrote into shared files: {changed}"


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """`serve` sets up its log for all of the process, where it no longer reaches `caplog`; not for the next test."""
    logs = [logging.getLogger(name) for name in ("doge_deploy.serve", "uvicorn", "asyncio")]
    before = [(log.handlers, log.propagate, log.level) for log in logs]
    yield
    for log, (handlers, propagate, level) in zip(logs, before, strict=True):
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_a_session() -> Iterator[None]:
    """ONNX Runtime takes all cores where it is not told a number of threads; here it takes one, as torch does."""
    if importlib.util.find_spec("onnxruntime") is None:
        yield
        return
    import onnxruntime

    class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    from doge_deploy.devices.host import usable_threads
    from doge_deploy.runtime.ort import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", OneThread)
        patch.setattr(session, "usable_threads", lambda asked: usable_threads(asked or 1))
        yield


@pytest.fixture(scope="session")
def dense_doge() -> Path:
    """A small dense checkpoint with random weights; do not write into it."""
    from random_doge import shared_doge  # transformers takes seconds, and most tests need no checkpoint

    return shared_doge()


@pytest.fixture(scope="session")
def moe_doge() -> Path:
    """A small mixture with 20 experts, 16 of them reachable; do not write into it."""
    from random_doge import SMALL_MOE, shared_doge

    return shared_doge(**SMALL_MOE)


@pytest.fixture(autouse=True)
def _denormal_numbers_stay() -> Iterator[None]:
    """`generate` and `bench` let the thread that runs them flush denormal numbers; a process of tests runs on."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


def _no_gpu() -> str:
    # Not torch, which may be a CPU build where there is a GPU.
    listed = run_tool(["nvidia-smi", "-L"])
    return "" if listed and "GPU " in listed else "needs a CUDA device; this machine has none"


def _no_tensorrt() -> str:
    if any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        return ""
    return "needs tensorrt or tensorrt-rtx; neither is installed"


NEEDS: dict[str, Callable[[], str]] = {"gpu": _no_gpu, "tensorrt": _no_tensorrt}
"""Markers of pyproject.toml, each with a function that says what is missing here, if anything."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, rather than deselect: the summary then counts these tests and gives the reason."""
    for marker, missing in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing() if marked else ""
        for item in marked if reason else []:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """doge-tiny in both layouts, fp32, logits of every token; do not write into it."""
    from bundles import shared_bundle

    return shared_bundle("doge-tiny", kv_cache=("static", "growing"), logits="all")


@pytest.fixture(scope="session")
def tiny_moe_bundle() -> Path:
    """doge-tiny-moe likewise, with transformers' routing."""
    from bundles import shared_bundle

    return shared_bundle("doge-tiny-moe", kv_cache=("static", "growing"), logits="all")
