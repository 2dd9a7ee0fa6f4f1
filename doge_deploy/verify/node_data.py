"""Node data for Model Explorer: the nodes of a graph that compute an output, coloured by the tolerance that it uses.

The format is that of `ModelNodeData` in Model Explorer's `node_data_builder.py`: by name of the graph, then by id of
the node. Ids are those of its ONNX adapter: a node's name, and `[io]` before that of an output.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.errors import UsageError
from doge_deploy.verify.files import write_text
from doge_deploy.verify.report import Report

LARGEST = 1e6
"""Stands for an infinite share, which JSON has not."""

THRESHOLDS = ((1 / 3, "#d8f0de"), (2 / 3, "#fff1bd"), (1.0, "#ffcf99"), (LARGEST, "#e5484d"))
"""Up to such a share of its tolerance a node has such a colour: the reference's own noise, twice that, all, more."""


def node_data(report: Report) -> dict[str, Any]:
    """Of the graph of the report's first layout: per node the largest share over the cases of that layout.

    Raises:
        UsageError: nothing was judged.
        BrokenBundleError: the bundle is not what it was.
    """
    import onnx

    if not report.results:
        raise UsageError("--node-data: no case was judged")
    layout = report.results[0].layout
    file = report.bundle / report.graphs[layout].split(",")[0]
    if not file.is_file():  # an engine, or a graph that was lowered for this run: the one that it was made of
        file = report.bundle / open_bundle(report.bundle).layout(layout).file
    graph = onnx.load(str(file), load_external_data=False).graph
    loads: dict[str, float] = {}
    for result in report.results:
        for quantity in result.quantities if result.layout == layout else ():
            loads[quantity.name] = max(loads.get(quantity.name, 0.0), min(quantity.load, LARGEST))
    makers = {output: node.name for node in graph.node for output in node.output}
    results = {}
    for output in graph.output:
        if output.name in loads:
            value = {"value": loads[output.name]}
            results[f"[io]{output.name}"] = value
            results[makers[output.name]] = value
    thresholds = [{"value": value, "bgColor": colour, "textColor": "#000000"} for value, colour in THRESHOLDS]
    return {graph.name: {"results": results, "thresholds": thresholds}}


def write_node_data(report: Report, path: Path) -> None:
    """Raises UsageError where the file cannot be written, and what `node_data` raises."""
    write_text(path, json.dumps(node_data(report), indent=2, allow_nan=False) + "\n")
