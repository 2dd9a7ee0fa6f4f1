"""Run kernels on PyTorch tensors: on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).

The same bindings, tiles and grids as in an engine; only who launches is different.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.kernels.interpreter import repair_interpreter
from doge_deploy.kernels.parameters import check_parameters
from doge_deploy.kernels.spec import Binding, OperatorPlugin, PluginSpec, Step, TensorSpec

if TYPE_CHECKING:
    import torch

INTERPRETER_ARCH = 87
"""The compute capability whose tiles the interpreter uses: the smallest device that the kernels are made for."""


def require_launcher(device: str) -> None:
    """Check that kernels can be run on tensors of this device type.

    Raises:
        MissingDependencyError: Triton is missing, or the device is not a GPU and Triton does not interpret.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        raise MissingDependencyError("triton is not installed: pip install 'doge-deploy[plugins]'") from None
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise MissingDependencyError(
            f"kernels run on a CUDA device, not on {device!r}; TRITON_INTERPRET=1, set at the start, interprets them"
        )


def run_operator(
    operator: OperatorPlugin,
    inputs: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    *,
    poison: bool = False,
    arch: int = INTERPRETER_ARCH,
) -> dict[str, torch.Tensor]:
    """Run the chain of one node of the `doge` domain.

    Args:
        operator: the plugin.
        inputs: the node's inputs by name; an optional one that is absent is left out.
        attributes: the node's attributes.
        poison: fill fresh memory with NaN and with impossible integers first, so that a place that is read before it
            is written is seen.
        arch: the compute capability whose tiles the interpreter uses.

    Returns:
        Every value of the chain by name, `output` among them.
    """
    values = dict(inputs)
    for step in operator.chain(attributes, frozenset(inputs)):
        values.update(run_step(step, values, poison=poison, arch=arch))
    return values


def run_step(
    step: Step, values: Mapping[str, torch.Tensor], *, poison: bool = False, arch: int = INTERPRETER_ARCH
) -> dict[str, torch.Tensor]:
    """Run one node of a chain; its outputs by the chain's names."""
    inputs = [_as_taken(values[name], tensor) for name, tensor in zip(step.inputs, step.spec.inputs, strict=True)]
    results = run_kernel(step.spec, inputs, step.attributes, poison=poison, arch=arch)
    return dict(zip(step.outputs, results, strict=True))


def _as_taken(tensor: torch.Tensor, expected: TensorSpec) -> torch.Tensor:
    """Operators have masks in bool, plugins in int32: see `PluginChainPass`, which writes the same cast."""
    import torch

    return tensor.to(torch.int32) if tensor.dtype == torch.bool and expected.dtype == "int32" else tensor


def run_kernel(
    spec: PluginSpec,
    tensors: Sequence[torch.Tensor],
    attributes: Mapping[str, Any],
    *,
    poison: bool = False,
    arch: int = INTERPRETER_ARCH,
) -> list[torch.Tensor]:
    """Allocate the outputs of one kernel and launch it.

    Args:
        spec: the kernel.
        tensors: its inputs in order, on one device; made contiguous where they are not.
        attributes: all of its attributes.
        poison, arch: see `run_operator`.

    Raises:
        UsageError: shapes, dtypes or attributes do not fit the spec.
        UnsupportedModelError: the kernel has other parameters than its spec says.
        MissingDependencyError: see `require_launcher`.
    """
    import torch

    device = tensors[0].device
    require_launcher(device.type)
    tensors = [tensor.contiguous() for tensor in tensors]
    binding = bind_tensors(spec, tensors, attributes)
    outputs = [
        torch.empty(shape, dtype=getattr(torch, binding.dtype_of(output)), device=device)
        for output, shape in zip(spec.outputs, binding.output_shapes, strict=True)
    ]
    if poison:
        for output in outputs:
            output.fill_(float("nan") if output.is_floating_point() else torch.iinfo(output.dtype).min)
    if all(output.numel() == 0 for output in outputs):
        return outputs
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    else:
        repair_interpreter()
    tile = binding.tile(arch)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.max_registers}
    if device.type != "cuda":
        options = {}
    kernel, constants = spec.load_kernel(), binding.constants(tile)
    check_parameters(spec.id, kernel.arg_names, spec.parameters, constants)
    kernel[binding.grid(tile)](*tensors, *binding.scalars, *outputs, **constants, **options)
    return outputs


def bind_tensors(spec: PluginSpec, tensors: Sequence[torch.Tensor], attributes: Mapping[str, Any]) -> Binding:
    """`spec.bind` with shapes and dtypes of these tensors.

    Raises:
        UsageError: they do not fit.
    """
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    floats = [name for name, expected in zip(names, spec.inputs, strict=False) if expected.dtype == "T"]
    if not floats:
        floats = ["float32"]
    binding = spec.bind([tuple(tensor.shape) for tensor in tensors], attributes, floats[0])
    for name, expected in zip(names, spec.inputs, strict=True):
        if name != binding.dtype_of(expected):
            raise UsageError(f"{spec.id}: {expected.name} is {name}; takes {binding.dtype_of(expected)}")
    return binding
