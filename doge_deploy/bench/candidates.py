"""Whatever can be timed.

A candidate is described in plain values, because it is opened in a process of its own.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.runtime.base import Runner
from doge_deploy.targets.backend import find

Kind = Literal["bundle", "transformers", "naive"]

_LIBRARIES = {
    "bundle": ("doge_deploy.runtime.backend",),
    "transformers": ("torch", "transformers.models.doge.modeling_doge", "doge_deploy.bench.baselines.eager"),
    "naive": ("onnxruntime", "doge_deploy.bench.baselines.naive"),
}


@dataclass(frozen=True)
class Candidate:
    """Something that runs a Doge."""

    name: str
    kind: Kind
    path: str
    """The bundle, the checkpoint of transformers, or the directory of a plain export."""
    dtype: str
    """NumPy's name of the dtype that it computes in."""
    max_length: int
    """Most tokens a row can hold."""
    vocab_size: int
    layout: str | None = None
    """Of a bundle."""
    portable: bool = False
    """Of a bundle: the standard graph, not the one lowered for the backend."""
    backend: str = DEFAULT_BACKEND
    """Of a bundle: what runs it."""
    last_logits: bool = True
    """Whether a call gives logits of the last token alone."""
    spin: int | None = None
    """Of a bundle: microseconds that idle threads wait for work, see `SessionOptions`."""
    num_layers: int | None = None
    """Of transformers: only so many layers; all where None."""


def import_libraries(candidate: Candidate) -> None:
    """Import what `open_candidate` needs, so that loading can be timed without it."""
    if candidate.kind == "bundle":
        find(candidate.backend).import_libraries()
    for name in _LIBRARIES[candidate.kind]:
        importlib.import_module(name)


def open_candidate(candidate: Candidate, threads: int) -> Runner:
    """Load a model, ready to run with `threads` threads where its backend lets them be chosen.

    Raises:
        DogeDeployError: it cannot be loaded.
    """
    if candidate.kind == "bundle":
        from doge_deploy.bundle.opening import open_bundle
        from doge_deploy.runtime.backend import open_backend

        takes_threads = "threads" in find(candidate.backend).session_options
        return open_backend(
            open_bundle(candidate.path, check="quick"),
            candidate.backend,
            layout=candidate.layout,
            threads=threads if takes_threads else None,
            spin=candidate.spin,
            flush_denormals=True,
            portable=candidate.portable,
        )
    if candidate.kind == "transformers":
        from doge_deploy.bench.baselines.eager import open_eager

        return open_eager(
            Path(candidate.path),
            dtype=candidate.dtype,
            num_layers=candidate.num_layers,
            max_length=candidate.max_length,
            last_logits=candidate.last_logits,
            threads=threads,
        )
    from doge_deploy.bench.baselines.naive import open_naive

    return open_naive(
        Path(candidate.path), max_length=candidate.max_length, last_logits=candidate.last_logits, threads=threads
    )
