"""Bodies are written in ONNX's text form, which reads like the formula; this turns one into an onnx-ir function."""

from __future__ import annotations

from collections.abc import Sequence

import onnx.parser
import onnx_ir as ir

from doge_deploy.graph.schemas import DOMAIN, VERSION

OPSET = 24


def parse_function(
    name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str], body: str
) -> ir.Function:
    """A local function `doge::name`; `body` is a list of nodes in ONNX text form, with `@name` for attributes."""
    head = f"{name} <{', '.join(attributes)}>" if attributes else name
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : {VERSION}]>\n'
        f"{head} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{body}\n}}"
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
