"""Parse the lowered graph and set up its build: everything that the two products have in common.

`trt` stands for either product's Python module, whose classes and functions have the same names.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

from doge_deploy.bundle.engine_record import EngineTensor
from doge_deploy.devices.tensorrt_limits import TENSORRT_DTYPES
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.targets.trt.job import Job
from doge_deploy.targets.trt.vendor import PRODUCTS

_DTYPES = {member: name for name, member in TENSORRT_DTYPES.items()}
_VERBOSITY = {"none": "NONE", "names": "LAYER_NAMES_ONLY", "detailed": "DETAILED"}


def create_network(trt: ModuleType, builder: Any, logger: Any, job: Job) -> Any:
    """The network of the job's graph, strongly typed: every layer computes in the dtype that the graph gives it.

    Raises:
        UnsupportedModelError: the vendor's parser refuses a node.
    """
    names = ["STRONGLY_TYPED", *(["PREFER_AOT_PYTHON_PLUGINS"] if job.plugins else [])]
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in names]
    network = builder.create_network(sum(1 << int(flag) for flag in flags if flag is not None))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(job.onnx_file).read_bytes(), path=job.weights_beside):
        product = PRODUCTS[job.target].name
        raise UnsupportedModelError(f"{product} {trt.__version__} refuses the graph: {_first_error(parser)}")
    return network


def _first_error(parser: Any) -> str:
    if not parser.num_errors:
        return "it does not say why"
    error = parser.get_error(0)
    rest = parser.num_errors - 1
    more = f" (and {rest} more)" if rest else ""
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {_one_line(error.desc())}{more}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def attention_layers(trt: ModuleType, network: Any) -> list[Any]:
    """The attentions of a network."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as ILayer
            found.append(layer.attention)
    return found


def count_layers(network: Any) -> dict[str, int]:
    """Layers by type, the most frequent first."""
    return dict(Counter(network.get_layer(i).type.name for i in range(network.num_layers)).most_common())


def describe_layers(network: Any) -> list[dict[str, Any]]:
    """Every layer with type and outputs, as JSON."""
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        layers.append(
            {
                "name": layer.name,
                "type": layer.type.name,
                "outputs": [{"dtype": output.dtype.name, "shape": _shape(output)} for output in outputs],
            }
        )
    return layers


def _shape(tensor: Any) -> list[int] | None:
    try:
        return [int(size) for size in tensor.shape]
    except ValueError:  # "__len__() should return >= 0" for a tensor of unknown rank
        return None


def binding_tensors(network: Any, job: Job) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
    """Inputs and outputs of the network, with the names of their axes where the signature has them."""

    def spec(tensor: Any) -> EngineTensor:
        sizes = [int(size) for size in tensor.shape]
        names = job.axes.get(tensor.name, tuple(sizes))
        shape = tuple(name if size < 0 else size for name, size in zip(names, sizes, strict=True))
        return EngineTensor(name=tensor.name, dtype=_DTYPES[tensor.dtype.name], shape=shape)

    inputs = tuple(spec(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(spec(network.get_output(i)) for i in range(network.num_outputs))
    return inputs, outputs


def create_config(trt: ModuleType, builder: Any, network: Any, job: Job) -> Any:
    """Builder configuration: flags, devices, memory, profiles.

    Raises:
        UsageError: the product does not know a compute capability.
    """
    config = builder.create_builder_config()
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, _VERBOSITY[job.verbosity])
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if not job.allow_tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if job.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)
    if job.compute_capabilities and job.target == "trt-rtx":
        _set_capabilities(trt, config, job.compute_capabilities)
    inputs, _ = binding_tensors(network, job)
    for profile in job.profiles:
        made = builder.create_optimization_profile()
        for tensor in inputs:
            if any(isinstance(axis, str) for axis in tensor.shape):
                shapes = (profile.shape(tensor, which) for which in ("min", "opt", "max"))
                made.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(made)
    return config


def _set_capabilities(trt: ModuleType, config: Any, capabilities: tuple[str, ...]) -> None:
    known = {name: value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    names = ["SM" + capability.replace(".", "") for capability in capabilities]
    unknown = [capability for name, capability in zip(names, capabilities, strict=True) if name not in known]
    if unknown:
        legal = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known)
        raise UsageError(
            f"compute_capabilities: TensorRT-RTX {trt.__version__} cannot build for {', '.join(unknown)}; "
            f"known: {legal}"
        )
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(known[name], index)


def flags_of(trt: ModuleType, config: Any) -> tuple[str, ...]:
    """Names of the builder flags that are set."""
    return tuple(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag))
