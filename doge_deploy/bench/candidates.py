"""Whatever can be timed.

A candidate is described in plain values, because it is opened in a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from doge_deploy.bundle.opening import Bundle
from doge_deploy.options.backends import DEFAULT_BACKEND

BUNDLE = "bundle"
"""The kind of a candidate that is a bundle; every other kind is the name of a baseline."""


@dataclass(frozen=True)
class Candidate:
    """Something that runs a Doge, or a model of its size."""

    name: str
    kind: str
    """`BUNDLE`, or the name of a baseline."""
    path: str
    """The bundle, the checkpoint of transformers, or what was made for a baseline."""
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
    weights: str | None = None
    """Of a bundle: how it stores them, see `weights_of`. Of a baseline: those of the bundles that it is compared with,
    of all where None."""
    rows: int | None = None
    """Most rows that it takes at once; any number where None."""
    same_model: bool = True
    """False where it runs another model of the same size."""

    @property
    def is_bundle(self) -> bool:
        return self.kind == BUNDLE


def weights_of(bundle: Bundle) -> str:
    """How a bundle stores its weights: the name of the weight format, or else of the dtype (`int8`, `fp32`)."""
    options = bundle.manifest.options
    return options.quantize or options.dtype
