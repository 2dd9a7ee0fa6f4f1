"""Checks of a written graph, before it is called a bundle."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.checker

from doge_deploy.bundle.signature import GraphTensor, Signature
from doge_deploy.dtypes import BY_ONNX
from doge_deploy.errors import BrokenBundleError


def check_model(path: Path, signature: Signature) -> None:
    """Run onnx's own checker on the file, and compare its inputs and outputs with the signature.

    Raises:
        BrokenBundleError: naming every input or output that differs.
    """
    onnx.checker.check_model(str(path))
    graph = onnx.load(path, load_external_data=False).graph
    problems = []
    for kind, values, specs in (("input", graph.input, signature.inputs), ("output", graph.output, signature.outputs)):
        found = [_spec(value) for value in values]
        problems += [f"{kind} {a} instead of {b}" for a, b in zip(found, specs, strict=False) if a != b]
        if len(found) != len(specs):
            problems.append(f"{len(found)} {kind}s instead of {len(specs)}")
    if problems:
        raise BrokenBundleError(f"{path.name} does not have its signature: {'; '.join(problems)}")


def _spec(value: onnx.ValueInfoProto) -> GraphTensor:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return GraphTensor(value.name, BY_ONNX[tensor.elem_type].name, shape)
