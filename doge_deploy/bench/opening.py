"""Opens a candidate in the process that times it."""

from __future__ import annotations

import importlib

from doge_deploy.bench.baselines.catalog import BASELINES
from doge_deploy.bench.candidates import Candidate
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.base import Runner
from doge_deploy.targets.backend import find


def import_libraries(candidate: Candidate) -> None:
    """Import what `open_candidate` needs, so that loading can be timed without it."""
    if candidate.is_bundle:
        find(candidate.backend).import_libraries()
        importlib.import_module("doge_deploy.runtime.backend")
        return
    for name in BASELINES[candidate.kind].load().LIBRARIES:
        importlib.import_module(name)


def open_candidate(candidate: Candidate, threads: int) -> Runner:
    """Load a model, ready to run with `threads` threads where its backend lets them be chosen.

    Raises:
        DogeDeployError: it cannot be loaded.
    """
    if not candidate.is_bundle:
        return BASELINES[candidate.kind].load().open_runner(candidate, threads)
    from doge_deploy.runtime.backend import open_backend

    takes_threads = "threads" in find(candidate.backend).session_options
    return open_backend(
        open_bundle(candidate.path, check="quick", wait=False),
        candidate.backend,
        layout=candidate.layout,
        threads=threads if takes_threads else None,
        spin=candidate.spin,
        flush_denormals=True,
        portable=candidate.portable,
    )
