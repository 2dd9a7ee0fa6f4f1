"""From two bundles, or one in two environments, to what makes the difference: weights, then graphs, then packages.

Neither torch nor transformers nor the checkpoint is needed: GOOD is the reference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.bundle.manifest import Manifest
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.bundle.signature import UNCACHED
from doge_deploy.devices.packages import require_graph_packages
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.stages import split_point, stage_of
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.runtime.ort.session import graph_file
from doge_deploy.targets.backend import SessionOptions, find
from doge_deploy.verify.bisect.environment import compare_environments
from doge_deploy.verify.bisect.finding import OPTION, PASS, TRACE, WEIGHT, Culprit
from doge_deploy.verify.bisect.graphs import guilty_pass, stage_differences
from doge_deploy.verify.bisect.weights import differing_tensors, first_culprit
from doge_deploy.verify.cases import Call, Limits, chunk, distinct_ids
from doge_deploy.verify.compare import Array, largest_error
from doge_deploy.verify.localize.calls import view_calls
from doge_deploy.verify.localize.column import Column
from doge_deploy.verify.replay import feed_call

STEPS = 2
"""Calls of one token after the prefill."""


def bisect(
    good: str | Path,
    bad: str | Path,
    *,
    good_python: str | None = None,
    bad_python: str | None = None,
    started: Callable[[str], None] = lambda what: None,
) -> Culprit | None:
    """Name the first weight, pass or package that makes two bundles of one checkpoint compute different things.

    Args:
        good, bad: bundles; the same one twice asks about the environments alone.
        good_python, bad_python: interpreters of two environments that have doge-deploy installed; where None, this one.
        started: told what is about to be done.

    Returns:
        The culprit; None where both compute the same.

    Raises:
        UnsupportedModelError: the bundles are of different checkpoints, or of a version that marked no stages.
        BrokenBundleError: a bundle is broken.
        MissingDependencyError: a package or an interpreter is missing.
    """
    require_graph_packages("bisect")
    one, two = open_bundle(good), open_bundle(bad)
    _require_one_checkpoint(one, two)
    option = _option(one, two)
    if option is not None:
        return option
    started("compare weights")
    found = _weight(one, two) or _graph(one, two, started)
    if found is not None:
        found.notes += _versions(one.manifest, two.manifest)
        return found
    if good_python is None and bad_python is None:
        return None
    started("compare environments")
    return compare_environments(one.path, two.path, good_python, bad_python, probe_calls(one))


def _require_one_checkpoint(one: Bundle, two: Bundle) -> None:
    hashes = [bundle.manifest.checkpoint["sha256"] for bundle in (one, two)]
    if hashes[0] != hashes[1]:
        raise UnsupportedModelError(
            f"{one.path} and {two.path} are of different checkpoints: sha256 {hashes[0][:12]}... and "
            f"{hashes[1][:12]}..."
        )


def _option(one: Bundle, two: Bundle) -> Culprit | None:
    """An option of the export in which the two differ: they are then not meant to compute the same."""
    first, second = (_plain(bundle.manifest.options) for bundle in (one, two))
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name):
            detail = f"GOOD was exported with {first.get(name)!r}, BAD with {second.get(name)!r}"
            return Culprit(OPTION, name, "", float("nan"), detail)
    return None


def _plain(options: Any) -> Mapping[str, Any]:
    return vars(options) if not hasattr(options, "model_dump") else dict(options.model_dump())


def probe_calls(bundle: Bundle) -> dict[str, tuple[Call, ...]]:
    """By layout: a prefill beyond the window, where the bundle can hold that, and a few tokens more."""
    manifest = bundle.manifest
    limits = Limits.of(manifest.facts, manifest.max_length, manifest.task)
    beyond = limits.keep_window_size + 16
    length = beyond if beyond <= limits.max_length else min(48, limits.max_length)
    row = distinct_ids(limits, length, seed=0)
    steps = min(STEPS, length - 1)
    cached, whole = [[length - steps], *[[1]] * steps], [[length]]
    return {name: chunk([row], whole if name == UNCACHED else cached) for name in manifest.layouts}


def outputs(bundle: Bundle, layout: str, calls: tuple[Call, ...], folder: Path | None = None) -> list[Array]:
    """What the served graph of a layout gives for the calls; the weight file is that of `folder` if one is named."""
    backend = find(DEFAULT_BACKEND)
    chosen = bundle.layout(layout)
    source = bundle
    graph = None
    if folder is not None:
        graph = (bundle.path / graph_file(chosen)).read_bytes()
        source = Bundle(folder, bundle.manifest)
    runner = backend.open(source, chosen, SessionOptions(spin=False), graph=graph)
    runner.reset(len(calls[0].lengths))
    return [np.array(row) for call in calls for row in feed_call(runner, call)]


def _weight(one: Bundle, two: Bundle) -> Culprit | None:
    names = differing_tensors(one.path, two.path)
    if not names:
        return None
    calls = probe_calls(one)
    layout = next(iter(calls))
    expected = outputs(one, layout, calls[layout])
    amounts: list[float] = []

    def differs(folder: Path) -> bool:
        found = outputs(one, layout, calls[layout], folder)
        amounts.append(largest_error(expected, found))
        return amounts[-1] > 0

    with tempfile.TemporaryDirectory() as scratch:
        name = first_culprit(one.path, two.path, names, Path(scratch), differs)
    if name is None:
        return None
    others = f"; {len(names) - 1} more tensors differ" if len(names) > 1 else ""
    detail = f"with the tensors of BAD up to it, the outputs of GOOD change by {amounts[0]:.1e}{others}"
    return Culprit(WEIGHT, name, "", amounts[0], detail)


def _graph(one: Bundle, two: Bundle, started: Callable[[str], None]) -> Culprit | None:
    for layout, calls in probe_calls(one).items():
        facts = one.manifest.facts
        views = view_calls(calls, layout, facts)
        static = layout not in ("growing", UNCACHED)
        columns = [_columns(bundle, layout) for bundle in (one, two)]
        standard = columns[0][0]
        for good, bad in zip(*columns, strict=True):
            started(f"compare {good.file.name}")
            if good.file.read_bytes() == bad.file.read_bytes():
                continue
            differences = stage_differences(good, bad, standard, views, calls, static=static)
            if not differences:
                continue
            found = differences[0]
            layer, _ = split_point(found.point)
            where = layout + ("" if layer is None else f", layer {layer}") + f", stage {stage_of(found.point)}"
            detail = f"on the same input this stage of {bad.file.name} is off by {found.amount:.1e}"
            if good is standard:
                return Culprit(TRACE, f"of {bad.file.name}", where, found.amount, detail)
            points = list(dict.fromkeys(one.point for one in differences))
            name = guilty_pass(good, bad, points) or "that is not known"
            return Culprit(PASS, name, where, found.amount, detail)
    return None


def _columns(bundle: Bundle, layout: str) -> list[Column]:
    """The standard graph, and the lowered one where there is one."""
    chosen = bundle.layout(layout)
    files = dict.fromkeys((chosen.file, graph_file(chosen)))
    backend = find(DEFAULT_BACKEND)
    return [
        Column(
            "standard" if file == chosen.file else "lowered",
            bundle.path / file,
            bundle,
            chosen,
            backend,
            SessionOptions(portable=file == chosen.file, spin=False),
            _same,
            _same,
        )
        for file in files
    ]


def _same(model: Any) -> Any:
    return model


def _versions(one: Manifest, two: Manifest) -> list[str]:
    """Packages in which the two exports differ."""
    first, second = one.libraries, two.libraries
    changed = [
        f"{name} {first.get(name, 'absent')} -> {second.get(name, 'absent')}"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    ]
    return [f"packages of the exports differ: {', '.join(changed)}"] if changed else []
