"""Plugin nodes of a graph, compared with the plugins that are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.diagnostics import join_findings
from doge_deploy.dtypes import BY_ONNX
from doge_deploy.errors import BrokenBundleError, UnsupportedModelError, UsageError
from doge_deploy.graph.passes.plugin_chains import (
    NAMESPACE_ATTRIBUTE,
    VERSION_ATTRIBUTE,
    PluginChainPass,
    value_shape,
)
from doge_deploy.kernels.preflight import PluginNode, Verdict, check_node
from doge_deploy.kernels.registry import Registry, installed

_STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


def check_plugins(model: ir.Model, registry: Registry) -> list[Verdict]:
    """A verdict on every node that TensorRT would take for a plugin: what is neither a standard operator nor a call of
    a local function.
    """
    return [check_node(node, registry) for node in _plugin_nodes(model)]


def require_plugins(model: ir.Model, registry: Registry) -> None:
    """Raises UnsupportedModelError naming every plugin node that cannot be built."""
    findings = [
        f"{verdict.node.name}: {problem}" for verdict in check_plugins(model, registry) for problem in verdict.problems
    ]
    if findings:
        raise UnsupportedModelError(f"plugins do not fit the graph: {join_findings(findings)}")


def _plugin_nodes(model: ir.Model) -> Iterator[PluginNode]:
    for node in model.graph.all_nodes():
        if node.op_identifier() in model.functions:
            continue
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.domain in _STANDARD_DOMAINS and NAMESPACE_ATTRIBUTE not in attributes:
            continue
        yield PluginNode(
            name=node.name or node.op_type,
            plugin=node.op_type,
            # TensorRT's parser reads the attributes, not the domain, and has these defaults
            namespace=attributes.pop(NAMESPACE_ATTRIBUTE, ""),
            version=attributes.pop(VERSION_ATTRIBUTE, "1"),
            attributes=attributes,
            dtypes=[_dtype_name(value) for value in node.inputs],
            shapes=[value_shape(value) if value is not None else None for value in node.inputs],
            num_outputs=len(node.outputs),
        )


def _dtype_name(value: ir.Value | None) -> str | None:
    if value is None or value.dtype is None:
        return None
    known = BY_ONNX.get(int(value.dtype))
    return known.name if known else value.dtype.name.lower()


def check_file(path: Path, registry: Registry | None = None) -> list[Verdict]:
    """Verdicts on a graph, operators that have a plugin lowered first.

    Args:
        path: an ONNX file, or a bundle, of which the first graph is taken.
        registry: the plugins; those that are installed where None.

    Raises:
        UsageError: there is no such file.
        BrokenBundleError: it is not a graph, or an incomplete bundle.
    """
    registry = installed() if registry is None else registry
    if path.is_dir():
        bundle = open_bundle(path)
        path = bundle.path / bundle.layout().file
    return check_plugins(PluginChainPass(registry)(_load(path)).model, registry)


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # protobuf's DecodeError, or anything that onnx-ir meets in what is no model
        raise BrokenBundleError(f"{path} is not an ONNX model: {error}") from error
