"""Fixtures that several test files share, and reasons to skip what this machine cannot run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from doge_deploy.doctor.probe import run_tool

# Triton decides when it is imported whether kernels are interpreted, and torch may import it at any time.
# `make test-gpu` sets TRITON_INTERPRET=0 and runs the tests that are marked `gpu` on the device.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def dense_doge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dense checkpoint with random weights; do not write into it."""
    from random_doge import save_random_doge  # transformers takes seconds, and most tests need no checkpoint

    return save_random_doge(tmp_path_factory.mktemp("checkpoints") / "dense")


@pytest.fixture(scope="session")
def moe_doge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture with 20 experts, 16 of them reachable; do not write into it."""
    from random_doge import SMALL_MOE, save_random_doge

    return save_random_doge(tmp_path_factory.mktemp("checkpoints") / "moe", **SMALL_MOE)


@pytest.fixture(autouse=True)
def _denormal_numbers_stay() -> Iterator[None]:
    """`generate` and `bench` let the thread that runs them flush denormal numbers; a process of tests runs on."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


def _no_gpu() -> str:
    # Not torch: the one of constraints.txt is a CPU build, wherever it is installed.
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
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """doge-tiny in both layouts, fp32, logits of every token; do not write into it."""
    from bundles import make_bundle

    path = tmp_path_factory.mktemp("bundles") / "doge-tiny"
    return make_bundle("doge-tiny", path, kv_cache=("static", "growing"), logits="all")


@pytest.fixture(scope="session")
def tiny_moe_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """doge-tiny-moe likewise, with transformers' routing."""
    from bundles import make_bundle

    path = tmp_path_factory.mktemp("bundles") / "doge-tiny-moe"
    return make_bundle("doge-tiny-moe", path, kv_cache=("static", "growing"), logits="all")
