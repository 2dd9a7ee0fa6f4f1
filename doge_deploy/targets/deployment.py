"""What `doctor` asks a backend about: a model, what is wanted of it, and what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from doge_deploy.config.model import DogeFacts
    from doge_deploy.graph.weight_formats import WeightFormat


@dataclass(frozen=True)
class DeployableModel:
    """A checkpoint or a bundle that is to run somewhere."""

    name: str
    facts: DogeFacts
    dtype: str | None
    """fp32, fp16 or bf16 where that is settled, as in a bundle."""
    max_length: int
    layouts: tuple[str, ...]
    """Of a bundle; a checkpoint may be exported in any."""
    last_logits: bool
    routing: str = "reference"
    """Of a mixture."""
    weight_format: WeightFormat | None = None
    """How matrices are stored; None for the dtype."""
    inlined: bool = False
    """The graphs call no local functions."""


@dataclass(frozen=True)
class Held:
    """What a backend holds in memory while it runs a model."""

    slots: int
    """Of a row's cache."""
    longest_call: int
    """Tokens of a row that are computed at once; longer calls are cut."""
    score_numbers: int = 1
    """float32 numbers beside a key and its value."""
    networks: int = 1
    """Each with weights of its own."""
    caches: int = 1
    keys: int = 0
    """That the tokens of a call attend to, at most; 0: as many as there are slots."""


@dataclass(frozen=True)
class Constraints:
    """What a file of export_configs/ or the command line asks for."""

    dtype: str | None = None
    """Of a bundle to be exported, whatever runs it; None for the backend's own."""
    engine_dtype: str = "fp16"
    """Of a bundle that an engine is built from: there are fused attention kernels for fp16 and bf16 only."""
    plugins: bool = True
    batch_size: int = 1


@dataclass(frozen=True)
class Obstacle:
    """Why something cannot be used, and what helps."""

    reason: str
    remedy: str
