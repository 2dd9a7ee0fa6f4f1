"""The plugin lowering: nodes of the `doge` domain become chains of plugin nodes, and lose their bodies."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from doge_deploy.dtypes import DTYPES
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.schemas import input_names
from doge_deploy.kernels import symbols
from doge_deploy.kernels.registry import Registry
from doge_deploy.kernels.spec import OperatorPlugin, Step, TensorSpec

NAMESPACE_ATTRIBUTE = "plugin_namespace"
VERSION_ATTRIBUTE = "plugin_version"
"""Read by TensorRT's ONNX parser, which looks a plugin up by the node's operator, its version and its namespace.
Reference: https://github.com/onnx/onnx-tensorrt, importer of nodes without an ONNX operator.
"""


class PluginChainPass(ir.passes.InPlacePass):
    """Replace every operator that has a plugin by its chain of plugin nodes.

    Needs: operators whose inputs are named, by their local function or by a schema of the `doge` domain.
    Promises: the graph's inputs and outputs keep name, dtype and shape; every value that a chain adds has its dtype
    and shape; local functions that nobody calls any more are gone. A node of a chain is called
    `<operator's node>/<plugin>`, its values `<operator's node>/<name in the chain>`.

    1. Fires on operators of `registry`, whether they have a body or not.
    2. Casts an input where the plugin takes it as int32 and the operator as bool: TensorRT's plugins take no bool.
    3. Must not guess: what a chain asks for and the operator does not have is an error.
    """

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self.registry = registry

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            operator = self.registry.operator(node.domain, node.op_type)
            if operator is not None:
                self._replace(model, node, operator)
                modified = True
        called = {node.op_identifier() for node in model.graph}
        called |= {node.op_identifier() for function in model.functions.values() for node in function}
        for identifier in [identifier for identifier in model.functions if identifier not in called]:
            del model.functions[identifier]
        return ir.passes.PassResult(model, modified)

    def _replace(self, model: ir.Model, node: ir.Node, operator: OperatorPlugin) -> None:
        names = input_names(model, node)
        values = {name: value for name, value in zip(names, node.inputs, strict=False) if value is not None}
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        output = node.outputs[0]
        casts: dict[str, ir.Value] = {}
        try:
            chain = operator.chain(attributes, frozenset(values))
        except KeyError as error:
            raise UnsupportedModelError(
                f"{node.name}: {node.op_type} has no attribute {error}; it has {', '.join(attributes)}"
            ) from None
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{node.name}: {error}") from None
        for step in chain:
            for name in step.inputs:
                if name not in values:
                    raise UnsupportedModelError(
                        f"{node.name}: plugin {step.spec.id} needs {name!r}; {node.op_type} has {', '.join(values)}"
                    )
            inputs = [
                self._cast(node, values[name], tensor, casts)
                for name, tensor in zip(step.inputs, step.spec.inputs, strict=True)
            ]
            made = _plugin_node(node, step, inputs)
            _insert_before(node, made)
            values.update(zip(step.outputs, made.outputs, strict=True))
        result = values["output"]
        if output.dtype is not None:
            result.dtype = output.dtype
        result.shape = output.shape
        result_name = output.name
        output.name = f"{node.name}/replaced"
        result.name = result_name
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
        _graph(node).remove(node, safe=True)

    def _cast(self, node: ir.Node, value: ir.Value, tensor: TensorSpec, casts: dict[str, ir.Value]) -> ir.Value:
        if value.dtype != ir.DataType.BOOL or tensor.dtype != "int32":
            return value
        if tensor.name not in casts:
            cast = ir.node("Cast", [value], {"to": ir.DataType.INT32}, name=f"{node.name}/{tensor.name}_int32")
            cast.outputs[0].name = cast.name
            cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.INT32, value.shape
            _insert_before(node, cast)
            casts[tensor.name] = cast.outputs[0]
        return casts[tensor.name]


def _plugin_node(node: ir.Node, step: Step, inputs: list[ir.Value]) -> ir.Node:
    """One node of the chain that replaces `node`; its outputs have name, dtype and shape."""
    spec = step.spec
    attributes: dict[str, Any] = {
        attribute.name: float(step.attributes[attribute.name])
        if attribute.type == "float"
        else step.attributes[attribute.name]
        for attribute in spec.attributes
    }
    attributes |= {NAMESPACE_ATTRIBUTE: spec.namespace, VERSION_ATTRIBUTE: spec.version}
    made = ir.node(
        spec.name,
        inputs,
        attributes,
        domain=node.domain,
        num_outputs=len(spec.outputs),
        name=f"{node.name}/{spec.name}",
    )
    dimensions = symbols.bind([tensor.shape for tensor in spec.inputs], [value_shape(value) or () for value in inputs])
    known = {**dimensions, **step.attributes}
    of_model = next(
        (value.dtype for value, tensor in zip(inputs, spec.inputs, strict=True) if tensor.dtype == "T"), None
    )
    for value, name, tensor in zip(made.outputs, step.outputs, spec.outputs, strict=True):
        value.name = f"{node.name}/{name}"
        dtype = of_model if tensor.dtype == "T" else ir.DataType(DTYPES[tensor.dtype].onnx_number)
        if dtype is not None:
            value.dtype = dtype
        value.shape = ir.Shape([symbols.dimension(size, known) for size in tensor.shape])
    return made


def value_shape(value: ir.Value) -> list[symbols.Dimension] | None:
    """Sizes and names of a value's axes, or None where not even their number is known."""
    if value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def _graph(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def _insert_before(node: ir.Node, made: ir.Node) -> None:
    _graph(node).insert_before(node, made)
