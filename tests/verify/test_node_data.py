"""Node data for Model Explorer: the right nodes, with the right shares."""

from __future__ import annotations

import json
import math
from pathlib import Path

import made_reports as made
import onnx
import pytest

from doge_deploy.cli.verify_outputs import Outputs
from doge_deploy.devices import packages
from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.verify.node_data import LARGEST, THRESHOLDS, node_data, write_node_data
from doge_deploy.verify.report import Report


@pytest.fixture
def report(tiny_bundle: Path) -> Report:
    """Of a bundle with layers 0 to 2."""
    cases = (
        made.case("prefill", key=0.2, layers=3),
        made.case("decode", key=0.6, layers=3),
        made.case("prefill", "growing", key=5.0, layers=3),
    )
    found = made.report(*cases)
    found.bundle, found.graphs = tiny_bundle, {"static": "model.onnx", "growing": "model.growing.onnx"}
    return found


def test_nodes_that_compute_outputs_have_the_largest_share_of_their_layout(report: Report) -> None:
    graph = onnx.load(str(report.bundle / "model.onnx"), load_external_data=False).graph
    ((name, data),) = node_data(report).items()
    assert name == graph.name
    nodes = {node.name: node for node in graph.node}
    assert data["results"]["[io]logits"] == {"value": pytest.approx(0.3)}
    named = {key: entry["value"] for key, entry in data["results"].items() if not key.startswith("[io]")}
    assert named.keys() <= nodes.keys()
    for node, share in named.items():
        expected = 0.3 if "logits" in nodes[node].output else 0.6
        assert share == pytest.approx(expected)
    assert len(named) == 7, "logits, and key and value of three layers; the made report has no scores"


def test_thresholds_rise_and_hold_every_share(report: Report, tmp_path: Path) -> None:
    report.results = [made.case("prefill", logits=math.inf)]
    write_node_data(report, tmp_path / "n.json")
    (data,) = json.loads((tmp_path / "n.json").read_text()).values()
    assert data["results"]["[io]logits"]["value"] == LARGEST == data["thresholds"][-1]["value"]
    assert [entry["value"] for entry in data["thresholds"]] == sorted(value for value, _ in THRESHOLDS)


def test_what_is_no_file_is_shown_on_the_graph_that_it_was_made_of(report: Report) -> None:
    before = node_data(report)
    report.graphs["static"] = "model.onnx lowered for TensorRT (sha256 00)"
    assert node_data(report) == before


def test_nothing_judged_is_refused(report: Report) -> None:
    report.results = []
    with pytest.raises(UsageError, match="no case was judged"):
        node_data(report)


def test_onnx_is_asked_for_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(user: str) -> None:
        raise MissingDependencyError(f"{user} needs onnx")

    monkeypatch.setattr(packages, "require_graph_packages", missing)
    with pytest.raises(MissingDependencyError, match="verify --node-data needs onnx"):
        Outputs({"node-data": tmp_path / "n.json"}).check()
    Outputs({"json": tmp_path / "r.json"}).check()
