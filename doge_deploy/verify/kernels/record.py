"""Record kernels: compiled as an engine gets them, with inputs, launch parameters and what must come out.

The output of a node must be that of its reference implementation, in the next wider dtype, within the noise of the
node's own; the integers that are handed from kernel to kernel must be those that Triton's interpreter finds at the
tiles of the device. A node whose interpreted chain does not agree with its reference implementation is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from doge_deploy import __version__
from doge_deploy.errors import MismatchError
from doge_deploy.kernels.compile import Compiled, compile_all
from doge_deploy.kernels.launch import bind_tensors, require_launcher, run_step
from doge_deploy.kernels.registry import installed
from doge_deploy.kernels.samples import Model
from doge_deploy.kernels.spec import Binding, OperatorPlugin, Step
from doge_deploy.verify.compare import Array, difference
from doge_deploy.verify.kernels.samples import Sample, samples
from doge_deploy.verify.kernels.schema import KIND, Expectation, KernelRecording, Launch, Node, Value
from doge_deploy.verify.noise import DRAWS, pool
from doge_deploy.verify.recording.container import Tensors, write_container
from doge_deploy.verify.tolerance import WIDER, AllowedDifference, limit

UNWRITTEN = int(np.iinfo(np.int32).min)
"""What fresh memory of integers is filled with, see `run_operator`."""


def record_kernels(
    output: Path,
    model: Model,
    *,
    dtype: str,
    archs: Sequence[int],
    started: Callable[[str], None] = lambda what: None,
) -> tuple[KernelRecording, str]:
    """Write a file for `plugins verify`.

    Args:
        output: the file.
        model: sizes that the kernels are compiled for.
        dtype: of T.
        archs: compute capabilities.
        started: told what is about to be done.

    Returns:
        What was written, and the sha256 of all of it.

    Raises:
        MissingDependencyError: Triton is missing, or is not told to interpret.
        UnsupportedModelError, CompileError: a kernel does not take the model or the device.
        MismatchError: a kernel, interpreted, does not compute what its reference implementation computes.
        UsageError: the file cannot be written.
    """
    require_launcher("cpu")
    tensors, nodes = Tensors(), []
    for sample in samples(model, dtype):
        for arch in archs:
            started(f"record {sample.name}, sm_{arch}")
            nodes.append(_node(sample, arch, tensors))
    versions = {"doge-deploy": __version__, **{name: metadata.version(name) for name in ("numpy", "torch", "triton")}}
    recording = KernelRecording(versions, tuple(nodes))
    return recording, write_container(output, KIND, asdict(recording), tensors)


def interpreted(
    operator: OperatorPlugin, sample: Sample, inputs: Mapping[str, torch.Tensor], arch: int
) -> Iterator[tuple[Step, Binding, dict[str, torch.Tensor]]]:
    """Each kernel of the chain in Triton's interpreter at the tiles of a device: its step, its node, all values so far.

    Memory is filled with what no kernel writes, so that places that are never written are known.
    """
    values = dict(inputs)
    for step in operator.chain(sample.attributes, frozenset(inputs)):
        values |= run_step(step, values, poison=True, arch=arch)
        taken = [_as_taken(values[name]) for name in step.inputs]
        yield step, bind_tensors(step.spec, taken, step.attributes), values


def _as_taken(tensor: torch.Tensor) -> torch.Tensor:
    """Masks are int32 in a plugin."""
    return tensor.to(torch.int32) if tensor.dtype == torch.bool else tensor


def _node(sample: Sample, arch: int, tensors: Tensors) -> Node:
    operator = installed().operator("doge", sample.operator)
    assert operator is not None, "doge-deploy brings it"
    inputs = sample.inputs(0)
    steps, values = [], inputs
    for step, binding, known in interpreted(operator, sample, inputs, arch):
        steps.append((step, binding))
        values = known
    compiled = list(compile_all([(binding, arch) for _, binding in steps]))
    launches = [
        _launch(step, binding, one, operator, sample, tensors)
        for (step, binding), one in zip(steps, compiled, strict=True)
    ]
    recorded = {}
    for name, tensor in values.items():
        taken = _as_taken(tensor)
        kind = str(taken.dtype).removeprefix("torch.")
        data = tensors.add(_array(taken), kind) if name in inputs else None
        recorded[name] = Value(kind, tuple(taken.shape), data)  # type: ignore[arg-type]
    expected = {"output": _output(sample, values["output"], inputs, tensors)}
    for step, _ in steps:
        for name in step.outputs:
            if not values[name].is_floating_point():
                expected[name] = Expectation(tensors.add(_array(values[name])), None, None, UNWRITTEN)
    return Node(sample.name, arch, recorded, tuple(launches), expected)


def _array(tensor: torch.Tensor) -> Array:
    """NumPy has no bfloat16: that is widened, exactly."""
    result: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return result


def _launch(
    step: Step, binding: Binding, compiled: Compiled, operator: OperatorPlugin, sample: Sample, tensors: Tensors
) -> Launch:
    record = compiled.record
    tile = binding.tile(record.arch)
    model = operator.costs.get(step.spec.name)
    cost = None if model is None else model(binding, tile, sample.past)
    arguments: list[Any] = [*step.inputs, *binding.scalars, *step.outputs]
    types = [type_ for _, type_ in record.signature]
    assert [type_ == "i32" for type_ in types] == [isinstance(argument, int) for argument in arguments]
    return Launch(
        plugin=record.plugin,
        ptx=tensors.add(np.frombuffer(compiled.ptx.encode(), np.uint8)),
        ptx_sha256=record.ptx_sha256,
        entry=record.entry,
        grid=binding.grid(tile),
        threads=record.threads,
        shared_memory_bytes=record.shared_memory_bytes,
        constants=dict(record.constants),
        arguments=tuple(arguments),
        memory_bytes=None if cost is None else cost.memory_bytes,
        flops=None if cost is None else cost.flops,
    )


def _output(sample: Sample, found: torch.Tensor, inputs: Mapping[str, torch.Tensor], tensors: Tensors) -> Expectation:
    """The reference implementation's output, and how far from it a kernel's, and the interpreter's, may be."""
    dtype = sample.dtype
    exact = sample.twin(inputs, WIDER[dtype]).to(getattr(torch, dtype))
    allowed = _allowed(sample, dtype)
    result = difference([_array(found)], [_array(exact)])
    if not result.within(allowed):
        raise MismatchError(
            f"{sample.name}: the kernels are off by {result.max_abs:.3g} in Triton's interpreter (allowed "
            f"{allowed.max_abs:.3g}): nothing was recorded"
        )
    return Expectation(tensors.add(_array(exact), dtype), allowed.max_abs, allowed.rms)


def _allowed(sample: Sample, dtype: str) -> AllowedDifference:
    """By the noise of the reference implementation on several inputs of the shape, see `TOLERANCES["kernel"]`."""
    draws = []
    for seed in range(DRAWS):
        inputs = sample.inputs(seed)
        same, wider = (sample.twin(inputs, one).double().numpy() for one in (dtype, WIDER[dtype]))
        draws.append(difference([same], [wider]))
    noise = pool(draws)
    return limit(
        "kernel", dtype, noise_max=noise.max_abs, noise_rms=noise.rms, scale=noise.scale, count=noise.effective
    )
