"""Finding the parts of a traced graph, and why a part is not there.

A pass looks for everything it needs before it changes anything. What it does not recognise raises `Declined`, and the
graph stays as it is: a lowering never guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from doge_deploy.graph.stages import move

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

CONTRIB_VERSION = 1


class Declined(Exception):
    """A pass does not apply; the message says what stands in its way."""


def producer(value: ir.Value | None, op_type: str, what: str) -> ir.Node:
    """The node that makes `value`, which must be an `op_type` of the standard domain.

    Raises:
        Declined: it is something else; `what` names the value in the message.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or node.domain not in ("", "ai.onnx"):
        raise Declined(f"{what} comes from {describe(value)} instead of {op_type}")
    return node


def describe(value: ir.Value | None) -> str:
    """What a value is, for a message."""
    if value is None:
        return "nothing"
    node = value.producer()
    return node.op_type if node is not None else f"the input {value.name!r}"


def expect(condition: bool, reason: str) -> None:
    """Raises Declined with `reason` where `condition` does not hold."""
    if not condition:
        raise Declined(reason)


def only_use(value: ir.Value, op_type: str, what: str) -> ir.Node:
    """The one node that reads `value`.

    Raises:
        Declined: there are others, it is not an `op_type`, or the value is a graph output.
    """
    uses = value.uses()
    expect(len(uses) == 1 and not value.is_graph_output(), f"{what} is used {len(uses)} times")
    node: ir.Node = next(iter(uses)).node
    expect(node.op_type == op_type, f"{what} is read by {node.op_type} instead of {op_type}")
    return node


def constant_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """The numbers of a constant 1-D or 0-D integer value, or None where it is none."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tuple(int(i) for i in tensor.numpy().reshape(-1))


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's value in Python types."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def stored_half(value: ir.Value) -> ir.Value | None:
    """The float16 initializer of which `value` is the cast to float32; None where it is none."""
    node = value.producer()
    if node is None or node.op_type != "Cast" or attribute(node, "to") != ir.DataType.FLOAT:
        return None
    source = node.inputs[0]
    return source if source is not None and source.is_initializer() and source.dtype == ir.DataType.FLOAT16 else None


def is_weight(value: ir.Value | None) -> bool:
    """An initializer, or the cast of one that is stored in half precision, which ONNX Runtime folds."""
    return value is not None and (value.is_initializer() or stored_half(value) is not None)


def stored_again(
    graph: ir.Graph, tensor: ir.ExternalTensor, name: str, *, dtype: ir.DataType, shape: Sequence[int]
) -> ir.Value:
    """An initializer of the bytes that `tensor` has in the weight file; `graph` gets it once for each name."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.const_value = ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        dtype,
        shape=ir.Shape(shape),
        name=name,
        base_dir=tensor.base_dir,
    )
    graph.register_initializer(value)
    return value


@dataclass(frozen=True)
class Linear:
    """x @ weight (+ bias): a linear layer as torch.export writes it, or with a quantized weight."""

    x: ir.Value
    product: ir.Node
    """MatMul with a weight `[in, out]`, or MatMulNBits."""
    bias: ir.Value | None
    output: ir.Value

    @property
    def weights(self) -> tuple[ir.Value | None, ...]:
        """All inputs of the product after the first; each is a weight."""
        return tuple(self.product.inputs[1:])

    @property
    def width(self) -> int:
        """Number of outputs."""
        if self.product.op_type == "MatMulNBits":
            return int(attribute(self.product, "N"))
        weight = self.product.inputs[1]
        assert weight is not None and weight.shape is not None
        return int(weight.shape[1])  # type: ignore[arg-type]


def linear_of(product: ir.Node) -> Linear | None:
    """The linear layer whose product `product` is; None where it is none."""
    is_product = product.op_type == "MatMul" or (product.op_type == "MatMulNBits" and product.domain == CONTRIB)
    if not is_product or not all(is_weight(value) for value in product.inputs[1:]):
        return None
    x, weight = product.inputs[:2]
    assert x is not None and weight is not None
    if product.op_type == "MatMul" and (weight.shape is None or len(weight.shape) != 2):
        return None
    output = product.outputs[0]
    users = [use.node for use in output.uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        bias = users[0].inputs[1]
        if bias is not None and bias.is_initializer() and bias.shape is not None and len(bias.shape) == 1:
            return Linear(x, product, bias, users[0].outputs[0])
    return Linear(x, product, None, output)


def match_linear(value: ir.Value | None, what: str) -> Linear:
    """The linear layer that makes `value`.

    Raises:
        Declined: it is none.
    """
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Add":
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    linear = linear_of(node) if node is not None else None
    if linear is None or linear.output is not value:
        raise Declined(f"{what} is not the output of a linear layer: it comes from {describe(value)}")
    return linear


class Emitter:
    """Makes nodes in front of a given one; values are named after what they replace."""

    def __init__(self, before: ir.Node, prefix: str) -> None:
        graph = before.graph
        assert isinstance(graph, ir.Graph)
        self._graph = graph
        self._before = before
        self._prefix = prefix

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Node:
        """Insert a node; its outputs are `<prefix>.<name or op_type>[.i]`."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs)
        for index, output in enumerate(node.outputs):
            suffix = f".{index}" if outputs > 1 else ""
            output.name = f"{self._prefix}.{name or op_type}{suffix}"
        self._graph.insert_before(self._before, node)
        return node

    def ints(self, *values: int, name: str) -> ir.Value:
        """A constant `[n]` int64."""
        return self("Constant", name=name, value_ints=list(values)).outputs[0]


def require_contrib(model: ir.Model) -> None:
    """Declare ONNX Runtime's domain, which the model now uses."""
    model.graph.opset_imports[CONTRIB] = CONTRIB_VERSION


def take_place(old: ir.Value, new: ir.Value) -> None:
    """`new` takes the place, the name, the type and the points of `old`, among the graph's outputs too."""
    move(old, new)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    name, new.shape, new.type = old.name, old.shape, old.type
    old.name, new.name = f"{name}.unused", name
