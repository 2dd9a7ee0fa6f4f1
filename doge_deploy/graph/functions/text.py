"""Bodies are written in ONNX's text form, which reads like the formula; this turns one into an onnx-ir function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx.parser
import onnx_ir as ir

from doge_deploy.graph.schemas import DOMAIN, VERSION

OPSET = 24


def parse_function(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Sequence[str],
    body: str,
    domains: Mapping[str, int] | None = None,
) -> ir.Function:
    """A local function `doge::name`; `body` is a list of nodes in ONNX text form, with `@name` for attributes.

    `domains` are those of its nodes besides the standard one and `doge`, with their versions.
    """
    imports = {"": OPSET, DOMAIN: VERSION, **(domains or {})}
    opsets = ", ".join(f'"{domain}" : {version}' for domain, version in imports.items())
    head = f"{name} <{', '.join(attributes)}>" if attributes else name
    text = (
        f'<domain: "{DOMAIN}", opset_import: [{opsets}]>\n'
        f"{head} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{body}\n}}"
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
