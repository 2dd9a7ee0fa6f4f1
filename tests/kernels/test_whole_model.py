"""A whole Doge whose plugin nodes are run by Triton's interpreter, judged by `verify` against transformers.

`make test` runs a few cases, `make test-full` one more, `nox -s kernels` all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from interpreter_runner import InterpreterRunner
from sweeps import cases

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.verify.cases import Case, Limits, exact_case, natural_case, repeating_ids
from doge_deploy.verify.live import LiveOracle
from doge_deploy.verify.parity import Judge
from doge_deploy.verify.runners import Runners

SWEEP = os.environ.get("DOGE_KERNEL_SWEEP") == "1"

SMALL = [
    ("doge-tiny", "prefill"),
    ("doge-tiny", "window K=w+1"),
    ("doge-tiny", "window decode"),
    ("doge-tiny-moe", "prefill"),
]
LONGER = [("doge-tiny-moe", "decode")]
ALL_CASES = (
    "prefill", "decode", "chunked prefill", "batch of 2", "window K=w-1", "window K=w", "window K=w+1", "window K=2w",
    "window decode", "window chunk", "natural text",
)  # fmt: skip
SELECTED = (
    [(model, case) for model in ("doge-tiny", "doge-tiny-moe") for case in ALL_CASES] if SWEEP else [*SMALL, *LONGER]
)


@pytest.fixture(scope="module")
def judge(tiny_bundle: Path, tiny_moe_bundle: Path) -> Callable[[str], Judge]:
    """A judge of each model."""
    bundles = {"doge-tiny": tiny_bundle, "doge-tiny-moe": tiny_moe_bundle}

    @cache
    def make(model: str) -> Judge:
        bundle, checkpoint = open_bundle(bundles[model]), open_checkpoint(model)
        runner = InterpreterRunner(bundle)
        return Judge(bundle, "static", Runners(runner, runner), LiveOracle(bundle, checkpoint))

    return make


def limits(bundle: Bundle) -> Limits:
    manifest = bundle.manifest
    return Limits(manifest.facts.vocab_size, manifest.max_length, manifest.facts.keep_window_size)


def find(judge: Judge, name: str, bounds: Limits) -> Case:
    if name == "natural text":
        return natural_case(bounds, repeating_ids(bounds, 256))
    assert isinstance(judge.oracle, LiveOracle)
    return judge.oracle.widest(judge, lambda seed: exact_case(bounds, seed, name))


@pytest.mark.parametrize(
    ("model", "name"), cases({" ".join(which): which for which in SELECTED}, [" ".join(which) for which in SMALL])
)
def test_the_plugin_lowering_computes_what_transformers_computes(
    judge: Callable[[str], Judge], tiny_bundle: Path, model: str, name: str
) -> None:
    chosen = judge(model)
    case = find(chosen, name, limits(open_bundle(tiny_bundle)))
    result = chosen.judge(case)
    assert result.failures == []
    assert "present.0.score" in {quantity.name for quantity in result.quantities}
    if "w+1" in name or name == "window decode" or model == "doge-tiny-moe":
        assert result.selected, "keys or experts were selected and not looked at"


def test_a_wrong_kernel_is_found(
    judge: Callable[[str], Judge], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A select kernel that drops the last of each row's w keys: one key too few."""
    from doge_plugins.dynamic_mask_attention import select_kernel

    chosen = judge("doge-tiny")
    original = select_kernel.select_kernel

    class OneLess:
        """Each row loses its w-th key. The list of kept slots stays: a wrong one would be read as addresses."""

        arg_names = original.arg_names

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                original[grid](*arguments, **constants)
                _threshold, last_kept, _kept, _kept_count = arguments[-4:]
                last_kept.fill_(-1)

            return launch

    monkeypatch.setattr(select_kernel, "select_kernel", OneLess())
    case = find(chosen, "window K=w+1", limits(open_bundle(tiny_bundle)))
    failures = chosen.judge(case).failures
    assert any("select other keys" in failure or "not a best one" in failure for failure in failures), failures
