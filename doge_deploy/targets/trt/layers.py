"""What the builder says about the engine: its own list of kernels, read from its log.

The product's inspector must open an engine, which needs the GPU that the engine is for. The same list is in the
builder's verbose log ("Layers:"), one kernel a line, where it is made. Its form is the vendor's and not documented; a
line that does not have it is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from doge_deploy.bundle.engine_record import KernelCounts

_KERNEL = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<rest>.*)$")
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<dtype>\w+)")
_TACTIC = re.compile(r"TacticName: (?P<tactic>[^,]*),")
_METADATA = re.compile(r"Metadata: (?P<metadata>.*)$")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_MEMORY = re.compile(r"^Total (?P<what>Activation|Weights) Memory: (?P<bytes>\d+)")


@dataclass
class Kernel:
    """One entry of the builder's list."""

    name: str
    type: str
    inputs: list[dict[str, str]]
    outputs: list[dict[str, str]]
    tactic: str
    onnx_layers: list[str]
    """Nodes of the lowered graph that it computes (part of)."""


@dataclass
class BuilderLog:
    """Collects what is worth keeping of a builder's log."""

    kernels: list[Kernel] = field(default_factory=list)
    activation_bytes: int | None = None
    weight_bytes: int | None = None
    errors: list[str] = field(default_factory=list)

    def read(self, message: str, *, is_error: bool) -> None:
        """Take note of one message."""
        if is_error:
            self.errors.append(message)
        found = _MEMORY.match(message)
        if found is not None:
            size = int(found["bytes"])
            if found["what"] == "Activation":
                self.activation_bytes = max(size, self.activation_bytes or 0)
            else:
                self.weight_bytes = size
        elif message.startswith("Layers:"):
            self.kernels += [kernel for line in message.split("\n") if (kernel := parse_kernel(line)) is not None]

    def forget(self) -> None:
        """Start again, for another attempt."""
        self.__init__()  # type: ignore[misc]


def parse_kernel(line: str) -> Kernel | None:
    """One line of the builder's list, or None where it is something else."""
    found = _KERNEL.match(line)
    if found is None:
        return None
    inputs, _, rest = found["rest"].partition("Outputs: ")
    outputs, _, tail = rest.partition("TacticName: ")
    tactic = _TACTIC.match("TacticName: " + tail)
    metadata = _METADATA.search(tail)
    return Kernel(
        found["name"],
        found["type"],
        _tensors(inputs),
        _tensors(outputs),
        tactic["tactic"] if tactic else "",
        _ONNX_LAYER.findall(metadata["metadata"]) if metadata else [],
    )


def _tensors(text: str) -> list[dict[str, str]]:
    return [found.groupdict() for found in _TENSOR.finditer(text)]


def count_kernels(kernels: Iterable[Kernel], low_bit: int = 0) -> KernelCounts | None:
    """The list in numbers; None where it is empty.

    Args:
        kernels: the list.
        low_bit: how many of them read weights of few bits.
    """
    kernels = list(kernels)
    if not kernels:
        return None
    precisions = Counter(kernel.outputs[0]["dtype"] for kernel in kernels if kernel.outputs)
    return KernelCounts(
        total=len(kernels),
        by_type=dict(Counter(kernel.type for kernel in kernels).most_common()),
        by_precision=dict(precisions.most_common()),
        fused_attention=sum("mha" in kernel.name for kernel in kernels),
        low_bit=low_bit,
    )


def describe(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """The list as JSON."""
    return [asdict(kernel) for kernel in kernels]
