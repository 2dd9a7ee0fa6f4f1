"""An example from checkpoint to judgement, by the machinery of `doge-deploy verify`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from bundles import make_bundle
from random_doge import save_random_doge

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.verify.cases import Case, Limits, chunk, distinct_ids
from doge_deploy.verify.live import LiveOracle
from doge_deploy.verify.parity import Judge
from doge_deploy.verify.runners import open_runners
from properties.space import VOCABULARY, Example


def make_case(example: Example, limits: Limits) -> Case:
    """The example's calls. Tokens repeat in some texts only: what ties is then judged by certificate."""
    rows = []
    for row, sizes in enumerate(zip(*example.calls, strict=True)):
        ids = distinct_ids(limits, VOCABULARY - 1, example.seed + row)
        length = sum(sizes)
        rows.append(np.resize(ids[: max(1, length // 3)], length) if example.repeating else ids[:length])
    return Case("drawn", chunk(rows, example.calls), exact=not example.repeating)


def check(example: Example, seconds: dict[str, float] | None = None) -> list[str]:
    """What is wrong with it, nothing if all is well; `seconds` is told where the time went."""
    seconds = {} if seconds is None else seconds

    def spent(what: str, since: float) -> float:
        now = perf_counter()
        seconds[what] = seconds.get(what, 0.0) + now - since
        return now

    with tempfile.TemporaryDirectory() as folder:
        now = perf_counter()
        path = save_random_doge(Path(folder) / "checkpoint", example.seed, task=example.saved, **example.config)
        now = spent("make checkpoint", now)
        bundle = open_bundle(make_bundle(path, Path(folder) / "bundle", **example.options))
        now = spent("export", now)
        checkpoint, manifest = open_checkpoint(str(path)), bundle.manifest
        oracle = LiveOracle(bundle, checkpoint)
        failures = list(oracle.weights(bundle).failures)
        oracle.forget()
        now = spent("load reference", now)
        (layout,) = manifest.layouts
        judge = Judge(bundle, layout, open_runners(bundle, layout), oracle)
        now = spent("open bundle", now)
        limits = Limits.of(manifest.facts, manifest.max_length, manifest.task)
        failures += judge.judge(make_case(example, limits)).failures
        spent("judge", now)
    return failures
