"""The points of a Doge have names in every form of its graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from bundles import shared_bundle
from random_doge import shared_doge

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.graph.passes.inline_functions import InlineFunctionsPass
from doge_deploy.graph.stages import COMPUTES, LAYER_POINTS, MADE_BY, computed, marked, split_point, stage_of
from doge_deploy.targets.ort.lower import PASSES
from doge_deploy.targets.trt.lowering import lower

SETS = {"selection", "expert_selection"}
MIXTURE = {"router", "experts"}


def expected(layers: int, *, moe: bool) -> set[str]:
    names = [name for name in LAYER_POINTS if name not in SETS and (moe or name not in MIXTURE)]
    points = {f"layers.{layer}.{name}" for layer in range(layers) for name in names}
    return points | {"embedding", "norm", "head"}


BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("doge-tiny", {}),
    "dense-growing": ("doge-tiny", {"kv_cache": ("growing",)}),
    "int8": ("doge-tiny", {"quantize": "int8"}),
    "fp16": ("doge-tiny", {"dtype": "fp16"}),
    "mixture": ("doge-tiny-moe", {}),
    "mixture-per-token": ("doge-tiny-moe", {"routing": "per-token"}),
}


@pytest.mark.parametrize(("model", "options"), BUNDLES.values(), ids=BUNDLES)
def test_every_point_is_marked_once(model: str, options: dict[str, Any]) -> None:
    bundle = open_bundle(shared_bundle(model, **options))
    facts = bundle.manifest.facts
    wanted = expected(facts.num_hidden_layers, moe=facts.is_moe)
    layout = bundle.layout()
    files = [layout.file, *(low.file for low in layout.lowered.values() if low.file)]
    for file in files:
        graph = ir.load(bundle.path / file)
        shown = Counter(point for _, points in marked(graph) for point in points)
        inside = {point for node in graph.graph for point in computed(node)}
        assert max(shown.values()) == 1, file
        assert inside == wanted, file
        missing = {stage_of(point) for point in wanted - set(shown)}
        # the fused attention rotates queries inside; rotated keys are in its cache
        assert missing <= ({"rope"} if file.endswith(".ort.onnx") else set()), file


@pytest.mark.parametrize("task", ["features", "sequence-classification"])
def test_tasks_without_a_cache_are_marked(task: str) -> None:
    bundle = open_bundle(shared_bundle(shared_doge(task=task), task=task))
    found = {point for _, points in marked(ir.load(bundle.path / "model.onnx")) for point in points}
    wanted = expected(bundle.manifest.facts.num_hidden_layers, moe=bundle.manifest.facts.is_moe)
    assert found == wanted - ({"head"} if task == "features" else set())


def test_passes_that_keep_numbers_keep_points(tiny_moe_bundle: Path) -> None:
    before = {point for _, points in marked(ir.load(tiny_moe_bundle / "model.onnx")) for point in points}
    inlined = InlineFunctionsPass()(ir.load(tiny_moe_bundle / "model.onnx")).model
    lowered = lower(ir.load(tiny_moe_bundle / "model.onnx"))
    for model in (inlined, lowered):
        assert {point for _, points in marked(model) for point in points} == before


def test_every_node_of_a_lowering_says_which_pass_made_it() -> None:
    bundle = shared_bundle("doge-tiny")  # with the logits of the last token, which a pass of its own rewrites
    standard = {node.name for node in ir.load(bundle / "model.onnx").graph}
    lowered = ir.load(bundle / "model.ort.onnx")
    makers = {node.metadata_props.get(MADE_BY) for node in lowered.graph if node.name not in standard}
    assert makers == {make.__name__ for make in PASSES} - {"QuantizedWeightsPass", "RoutedExpertsPass"}
    fused = [node for node in lowered.graph if node.op_type == "GroupQueryAttention"]
    inside = [[split_point(point)[1] for point in node.metadata_props[COMPUTES].split()] for node in fused]
    assert inside == [["rope_q", "rope_k"]] * len(fused)
