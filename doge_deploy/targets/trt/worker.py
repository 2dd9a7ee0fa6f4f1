"""A build in a process of its own: the vendor's library may end the process; then only this one ends.

A job comes in, events go out (`job.py`); everything else, the vendor's own output too, goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from doge_deploy.bundle.engine_record import Decomposed
from doge_deploy.bundle.writing import saying_where
from doge_deploy.devices.host import peak_memory_bytes
from doge_deploy.errors import DogeDeployError, MissingDependencyError, UnsupportedModelError
from doge_deploy.process.worker import Channel, connect, error_message
from doge_deploy.targets.trt.job import Advanced, Finished, Job
from doge_deploy.targets.trt.layers import BuilderLog, count_kernels, describe
from doge_deploy.targets.trt.low_bits import LowBits, examine, problem
from doge_deploy.targets.trt.network import (
    attention_layers,
    binding_tensors,
    count_layers,
    create_config,
    create_network,
    describe_layers,
    flags_of,
)
from doge_deploy.targets.trt.phases import Phases
from doge_deploy.targets.trt.plugins import plugins_for
from doge_deploy.targets.trt.vendor import PRODUCTS, import_product

_NO_KERNEL = "not supported by a dedicated kernel"
"""In the vendor's message where an attention has no fused kernel and may not be decomposed."""

_NEEDS_DEVICE = "CHECK(status == CUDA_SUCCESS)"
"""In the vendor's message where a build calls the driver. TensorRT-RTX 1.7 does so to strip or refit weights."""

_MESSAGE = 2000
"""Characters of a vendor's message that are kept in the log."""

_STEP = 0.005
"""Progress is told in steps of half a percent."""


def main() -> int:
    """Run the job that comes first on standard input; the exit status is 0 in every orderly case."""
    channel = connect()
    job = Job.model_validate_json(sys.stdin.readline())
    try:
        message = run(job, channel).model_dump(mode="json")
    except DogeDeployError as error:
        message = error_message(error)
    channel.send(message)
    return 0


def run(job: Job, channel: Channel) -> Finished:
    """Build the engine and write it, and the report of its layers.

    Raises:
        UsageError, UnsupportedModelError, MissingDependencyError: no engine, and the reason.
    """
    plugins = plugins_for(job.plugins)
    trt = import_product(job.target)
    for plugin in plugins:
        plugin.register(job.compute_capabilities)
    log = BuilderLog()
    logger = _make_logger(trt, log)
    builder = trt.Builder(logger)
    network = create_network(trt, builder, logger, job)
    attentions = attention_layers(trt, network)
    with _timing_cache(job) as cache:
        config, engine = _attempt(trt, builder, network, job, channel, cache)
        decomposed: tuple[Decomposed, ...] = ()
        if engine is None and any(_NO_KERNEL in error for error in log.errors):
            decomposed = _decompose(attentions, job)
            log.forget()
            config, engine = _attempt(trt, builder, network, job, channel, cache)
    if engine is None:
        raise _failure(trt, job, log)
    low_bits = _examined(trt, job, log)
    report = {"network": describe_layers(network), "kernels": describe(log.kernels)}
    staged = Path(job.engine_file).parent
    with saying_where(staged.parent.parent, staged):  # the bundle
        Path(job.engine_file).write_bytes(memoryview(engine))
        Path(job.report_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    inputs, outputs = binding_tensors(network, job)
    return Finished(
        version=trt.__version__,
        compute_capabilities=job.compute_capabilities,
        flags=flags_of(trt, config),
        inputs=inputs,
        outputs=outputs,
        layers_by_type=count_layers(network),
        decomposed=decomposed,
        kernels=count_kernels(log.kernels, low_bits.kernels if low_bits else 0),
        activation_bytes=log.activation_bytes,
        engine_weight_bytes=log.weight_bytes,
        peak_memory_bytes=peak_memory_bytes() or 0,
    )


def _attempt(
    trt: ModuleType, builder: Any, network: Any, job: Job, channel: Channel, cache: bytearray | None
) -> tuple[Any, Any]:
    """One build: the configuration, and the engine's bytes or None."""
    config = create_config(trt, builder, network, job)
    monitor = _make_monitor(trt, channel)
    config.progress_monitor = monitor
    timing = None
    if cache is not None:
        timing = config.create_timing_cache(bytes(cache))
        config.set_timing_cache(timing, ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if cache is not None and timing is not None and engine is not None:
        cache[:] = bytes(memoryview(config.get_timing_cache().serialize()))
    return config, engine


def _decompose(attentions: list[Any], job: Job) -> tuple[Decomposed, ...]:
    """Let the attentions run as several kernels. They all have the same shape, so that one speaks for all."""
    for attention in attentions:
        attention.decomposable = True
    lengths = ", ".join(f"{p.name} {p.axes['sequence_length']}" for p in job.profiles)
    reason = f"no fused kernel for these heads and this dtype at sequence lengths {lengths}"
    return tuple(Decomposed(layer=attention.name, reason=reason) for attention in attentions)


def _examined(trt: ModuleType, job: Job, log: BuilderLog) -> LowBits | None:
    """What kernels do with weights of few bits; None where there are none, or the builder listed no kernels.

    Raises:
        UnsupportedModelError: the builder widens them.
    """
    if not job.low_bit_numbers or not log.kernels:
        return None
    found = examine(log.kernels, job.axes)
    if reason := problem(found, job.low_bit_numbers):
        raise UnsupportedModelError(f"{PRODUCTS[job.target].name} {trt.__version__} {reason}")
    return found


def _failure(trt: ModuleType, job: Job, log: BuilderLog) -> DogeDeployError:
    """The vendor's last error in one line, and who can mend it."""
    product = f"{PRODUCTS[job.target].name} {trt.__version__}"
    reason = " ".join(log.errors[-1].split()) if log.errors else "it does not say why"
    if _NEEDS_DEVICE in reason:
        what = "to strip weights" if job.strip_weights else "to build this"
        return MissingDependencyError(f"{product} needs a CUDA device {what}, and there is none: {reason}")
    return UnsupportedModelError(f"{product} cannot build this graph: {reason}")


@contextlib.contextmanager
def _timing_cache(job: Job) -> Iterator[bytearray | None]:
    """The timing cache file, read before and replaced after; None where there is none."""
    if job.timing_cache is None:
        yield None
        return
    file = Path(job.timing_cache)
    cache = bytearray(file.read_bytes() if file.is_file() else b"")
    yield cache
    aside = file.with_name(f".{file.name}.partial")
    aside.write_bytes(cache)
    aside.replace(file)


def _make_logger(trt: ModuleType, log: BuilderLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            is_error = severity <= trt.ILogger.ERROR
            log.read(message, is_error=is_error)
            if severity <= trt.ILogger.INFO:
                sys.stderr.write(f"[{severity.name}] {message[:_MESSAGE]}\n")
                sys.stderr.flush()

    return Logger()


def _make_monitor(trt: ModuleType, channel: Channel) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()
            self.told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name, step)
            fraction = self.phases.fraction()
            if fraction < self.told + _STEP:
                return True
            self.told = fraction
            return channel.send(Advanced(fraction=fraction, phase=phase_name).model_dump(mode="json"))

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
