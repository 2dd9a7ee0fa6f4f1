"""What passes between the command and the process that builds: a job in, events out (`doge_deploy.process`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from doge_deploy.bundle.engine_record import Decomposed, EngineProfile, EngineTensor, KernelCounts
from doge_deploy.bundle.signature import Signature
from doge_deploy.options.build import BuildOptions, Target


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Message):
    """One engine to build."""

    target: Target
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
    low_bit_numbers: int = 0
    """See `doge_deploy.targets.trt.low_bits`."""


def make_job(
    options: BuildOptions,
    *,
    onnx_file: Path,
    weights_beside: Path,
    engine_file: Path,
    report_file: Path,
    profiles: tuple[EngineProfile, ...],
    signature: Signature,
    compute_capabilities: tuple[str, ...],
    plugins: tuple[str, ...],
    low_bit_numbers: int,
) -> Job:
    """The job that the options ask for; see `Job` for the other arguments."""
    return Job(
        target=options.target,
        onnx_file=str(onnx_file),
        weights_beside=str(weights_beside),
        engine_file=str(engine_file),
        report_file=str(report_file),
        profiles=profiles,
        axes={spec.name: spec.shape for spec in (*signature.inputs, *signature.outputs)},
        compute_capabilities=compute_capabilities,
        allow_tf32=False,
        workspace_bytes=None if options.workspace_mib is None else options.workspace_mib << 20,
        strip_weights=options.strip_weights,
        verbosity=options.verbosity,
        timing_cache=options.timing_cache,
        plugins=plugins,
        low_bit_numbers=low_bit_numbers,
    )


class Advanced(_Message):
    """How far the builder says it is."""

    event: Literal["advanced"] = "advanced"
    fraction: float
    phase: str


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


Event = Annotated[Advanced | Finished, Field(discriminator="event")]
EVENTS: TypeAdapter[Advanced | Finished] = TypeAdapter(Event)
