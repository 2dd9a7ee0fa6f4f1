"""What passes between the command and the process that builds: a job in, events out, one JSON object a line."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from doge_deploy.bundle.engine_record import Decomposed, EngineProfile, EngineTensor, KernelCounts
from doge_deploy.options.build import Target


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Message):
    """One engine to build."""

    target: Target
    parent_pid: int
    """The process that waits for the result; without it there is nothing to do."""
    onnx_file: str
    """The lowered graph."""
    weights_beside: str
    """A path in the folder that the graph's external data is relative to."""
    engine_file: str
    report_file: str
    profiles: tuple[EngineProfile, ...]
    axes: dict[str, tuple[str | int, ...]]
    """Shape of every input by name, as in the signature."""
    compute_capabilities: tuple[str, ...]
    allow_tf32: bool
    workspace_bytes: int | None
    strip_weights: bool
    verbosity: Literal["none", "names", "detailed"]
    timing_cache: str | None
    plugins: tuple[str, ...]
    """`doge` operators whose plugins are to be registered first."""


class Progress(_Message):
    """How far the builder says it is."""

    event: Literal["progress"] = "progress"
    fraction: float
    phase: str


class Failed(_Message):
    """A build that ended in an orderly way, without an engine."""

    event: Literal["failed"] = "failed"
    kind: Literal["usage", "unsupported", "missing"]
    message: str


class Finished(_Message):
    """What the process knows about the engine it wrote."""

    event: Literal["finished"] = "finished"
    version: str
    compute_capabilities: tuple[str, ...]
    flags: tuple[str, ...]
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    layers_by_type: dict[str, int]
    decomposed: tuple[Decomposed, ...]
    kernels: KernelCounts | None
    activation_bytes: int | None
    engine_weight_bytes: int | None
    peak_memory_bytes: int


Event = Annotated[Progress | Failed | Finished, Field(discriminator="event")]
EVENTS: TypeAdapter[Progress | Failed | Finished] = TypeAdapter(Event)
