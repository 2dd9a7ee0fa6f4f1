"""What every weight format answers.

Axes: N rows and C columns of a weight, as the checkpoint has them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from doge_deploy.dtypes import DTYPES, NAMES, ShortName
from doge_deploy.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    import torch

    Array = npt.NDArray[Any]

KEPT = {
    "dt_proj": "it decides which keys are kept, through an exponential",
    "router_gate": "it decides which experts are taken",
}
"""Linear layers that keep their dtype in every format, with the reason. They are small."""


@dataclass(frozen=True)
class Quality:
    """What rounding the weights may cost on held-out text."""

    mean_kl: float
    """Nats, against the reference with the checkpoint's own weights."""
    perplexity_ratio: float
    """Times the reference's."""
    sure_top1: float
    """Share of equal likeliest tokens among positions where the reference is sure."""
    reason: str


@dataclass(frozen=True)
class Part:
    """One initializer that a weight is stored as."""

    name: str
    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    constant: bool = False
    """Follows from the shape of the weight alone, so that weights share it and nobody has to read it."""

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].nbytes(math.prod(self.shape))


class PartSource(NamedTuple):
    """What an initializer is a part of."""

    tensor: str
    """The checkpoint's name of the weight; "" of a constant."""
    key: str
    """In what `store` gives; the name of the initializer where it is a constant."""
    dtype: str
    """A key of `DTYPES`."""


class WeightFormat(ABC):
    """One way to store the matrices of a bundle.

    Args:
        block_size: numbers of a row that share a scale, at most; the format's default where None.
        symmetric: whether the zero point is the middle of the range. Only formats with blocks have a choice.
        dtype: what the graph computes in.

    Raises:
        UsageError: the format has no blocks, or none of that size; or it is not offered for this dtype.
    """

    name: ClassVar[str]
    """The name of its file, and the value of `--quantize`."""
    title: ClassVar[str]
    """For the help of `--quantize`: "8 bits, block by block"."""
    quality: ClassVar[Quality]
    block_sizes: ClassVar[tuple[int, ...]] = ()
    """Legal block sizes; empty where the format has no blocks."""
    default_block_size: ClassVar[int | None] = None
    dtypes: ClassVar[tuple[ShortName, ...]] = ("fp32",)
    """What a graph with such weights may compute in, the default first."""
    rounds_activations: ClassVar[bool] = False
    """Whether what ONNX Runtime runs for it rounds activations too, so that parity is judged on the standard graph."""
    rounds_inputs_to: ClassVar[str] = ""
    """What an engine rounds the other side of a product to, a key of `DTYPES`; "" where it stays as it is. Its scales
    are calibrated when a model is exported."""
    first_capability: ClassVar[str] = ""
    """The first compute capability with engines of such weights; "" where every one has them."""
    targets: ClassVar[frozenset[str]] = frozenset({"ort"})
    """What accepts a bundle with such weights: `ort`, `trt`, `trt-rtx`, `torch-kernels`."""

    def __init__(self, *, block_size: int | None = None, symmetric: bool = True, dtype: ShortName = "fp32") -> None:
        if dtype not in self.dtypes:
            legal = " or ".join(self.dtypes)
            raise UsageError(
                f"quantize={self.name} with dtype={dtype}: {self.name} weights are computed with in {legal}; give "
                f"dtype={self.dtypes[0]}"
            )
        if block_size is not None and block_size not in self.block_sizes:
            sizes = ", ".join(map(str, self.block_sizes))
            legal = f"must be one of {sizes}" if sizes else "this format has no blocks"
            raise UsageError(f"block_size={block_size} with quantize={self.name}: {legal}")
        self.block_size = block_size or self.default_block_size
        self.symmetric = symmetric
        self.dtype = NAMES[dtype]
        self.ranges: Mapping[str, float] = {}
        """While a model is exported: by name of a weight the largest magnitude of what is multiplied with it, where
        that is to be rounded. See `doge_deploy.graph.ranges`."""
        self.chosen: Mapping[str, Mapping[str, torch.Tensor]] = {}
        """By name of a weight what `store_by` gave for it. See `doge_deploy.graph.feedback`."""

    def __str__(self) -> str:
        if not self.block_sizes:
            return f"{self.name} ({self.title})"
        zero = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.name} ({self.title} of at most {self.block_size} numbers, {zero})"

    def target_refusal(self, target: str) -> str:
        """Why `target` does not accept a bundle with such weights; "" where it does."""
        if target in self.targets:
            return ""
        if target == "torch-kernels":
            return "has quantized weights; kernels are verified with unquantized ones"
        return f"stores its weights as {self.name}, which {target} does not take"

    def target_remedy(self, target: str) -> str:
        """What helps where `target` does not accept it."""
        return "export without --quantize"

    @property
    def uses_covariances(self) -> bool:
        """Whether numbers are chosen by what weights are multiplied with on some text, where there is one."""
        return False

    @property
    def is_calibrated(self) -> bool:
        """Whether a text is looked at when a model is exported."""
        return self.uses_covariances or bool(self.rounds_inputs_to)

    @property
    def range_dtype(self) -> str:
        """The dtype whose range a weight must not leave."""
        return self.dtype

    def refusal(self, name: str, shape: Sequence[int]) -> str:
        """Why a tensor of the checkpoint keeps the model's dtype; "" where it is stored in this format."""
        if len(shape) != 2:
            return "it is no matrix"
        return next((why for part, why in KEPT.items() if f".{part}." in name), "")

    def range_dtypes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """The dtype whose range each tensor of a checkpoint must not leave, of those that this format stores."""
        return {name: self.range_dtype for name, shape in shapes.items() if not self.refusal(name, shape)}

    @abstractmethod
    def parts(self, name: str, shape: tuple[int, int]) -> dict[str, Part]:
        """The initializers that a weight `[N, C]` becomes, by what they are: `values`, `scale` and the like."""

    @abstractmethod
    def part_of(self, initializer: str, dtype: str) -> PartSource | None:
        """What an initializer is a part of; None where it is no part of a weight in this format.

        Args:
            initializer: its name.
            dtype: `DType.name`, or the name that safetensors has for a dtype that no model has.
        """

    @abstractmethod
    def store(self, weight: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        """The numbers of all parts of a weight `[N, C]` that are not constant, those of less than a byte unpacked."""

    def store_by(self, weight: torch.Tensor, covariance: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        """As `store`, for the least error of products with inputs of this covariance, `[C, C]` float64.

        A format that does not use covariances stores the same with any.
        """
        return self.store(weight, name)

    def numbers(self, weight: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        """What a bundle holds of a weight `[N, C]`: what was chosen for it, else what `store` gives."""
        return dict(self.chosen[name]) if name in self.chosen else self.store(weight, name)

    def constant(self, initializer: str) -> torch.Tensor:
        """The numbers of a constant part, unpacked.

        Raises:
            ValueError: it is none.
        """
        raise ValueError(f"{initializer!r} is no constant of weights stored as {self.name}")

    @abstractmethod
    def dequantize(self, parts: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """The weight `[N, C]` that stored numbers stand for: the reference for what the graph's nodes compute.

        Args:
            parts: what `store` gives, as arrays.
        """

    @abstractmethod
    def rewrite(self, graph: ir.Graph, weight: ir.Value, name: str, *, transposed: bool) -> None:
        """Replace an initializer in float32 by its parts and the standard nodes that dequantize them.

        Args:
            graph: the standard graph, to be changed. The parts get `pending` data.
            weight: the initializer, `[N, C]`, or `[C, N]` where `transposed`.
            name: of the tensor in the checkpoint.
            transposed: see `TransposeWeightsPass`.
        """

    def input_scale(self, name: str) -> float | None:
        """Of the numbers that what is multiplied with a weight is rounded to; None where it is not rounded."""
        return None

    def stored_bytes(self, name: str, shape: tuple[int, int]) -> int:
        """Bytes of a weight in the weight file, constants that weights share left out."""
        return sum(part.nbytes for part in self.parts(name, shape).values() if not part.constant)

    def loaded_bytes(self, name: str, shape: tuple[int, int], *, gathered: bool) -> int:
        """Bytes of a weight once a runtime has loaded it.

        Args:
            name: the checkpoint's.
            shape: `[N, C]`; of some rows of a weight what they take.
            gathered: only rows are looked up, as of a table of experts; else it is multiplied with.
        """
        return self.stored_bytes(name, shape)

    def dequantized(self, weight: torch.Tensor, name: str = "") -> torch.Tensor:
        """What a weight `[N, C]` of the checkpoint becomes, float32."""
        import torch

        parts = {key: as_array(part) for key, part in self.numbers(weight, name).items()}
        return torch.from_numpy(self.dequantize(parts))


def as_array(part: torch.Tensor) -> Array:
    """A stored part for NumPy, which has neither bfloat16 nor float8: such numbers are widened to float32."""
    import torch

    return (part.float() if part.dtype in (torch.bfloat16, torch.float8_e4m3fn) else part).numpy()


def rounded(array: Array, dtype: str) -> npt.NDArray[np.float32]:
    """float32 numbers as they are in `dtype`, a key of `DTYPES`."""
    import ml_dtypes
    import numpy as np

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    found: npt.NDArray[np.float32] = array.astype(kind).astype(np.float32)
    return found


def power_of_two(number: float) -> float:
    """The smallest power of two that is not below a positive number."""
    return 2.0 ** math.ceil(math.log2(number))


def add_part(graph: ir.Graph, part: Part) -> ir.Value:
    """The initializer of `graph` that is this part, its data pending."""
    import onnx_ir as ir

    from doge_deploy.graph.passes.pending import pending

    if part.name in graph.initializers:
        return graph.initializers[part.name]
    dtype, shape = ir.DataType(DTYPES[part.dtype].onnx_number), ir.Shape(part.shape)
    value = ir.Value(name=part.name, shape=shape, type=ir.TensorType(dtype))
    value.const_value = pending(dtype, ir.Shape(part.shape), part.name)
    graph.register_initializer(value)
    return value


def replace_weight(graph: ir.Graph, weight: ir.Value, nodes: Sequence[ir.Node], name: str, *, transposed: bool) -> None:
    """Let the readers of `weight` read the output of the last of `nodes`, `[N, C]`, and remove the initializer."""
    import onnx_ir as ir

    assert weight.shape is not None and weight.name is not None
    added, result = [*nodes], nodes[-1].outputs[0]
    shape = weight.shape[::-1] if transposed else weight.shape
    result.name, result.shape, result.type = f"{name}.dequantized", ir.Shape(shape), weight.type
    if transposed:
        added.append(ir.node("Transpose", [result], {"perm": [1, 0]}))
        result = added[-1].outputs[0]
        result.name, result.shape, result.type = weight.name, weight.shape, weight.type
    graph.insert_before(graph[0], added)
    weight.replace_all_uses_with(result)
    del graph.initializers[weight.name]
