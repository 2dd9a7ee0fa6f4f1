"""Queries and keys are normalised by one node in an engine, and get the numbers of two."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from bundles import shared_bundle
from random_doge import SMALL, shared_doge

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.graph.stages import marked
from doge_deploy.runtime.ort import open_runner
from doge_deploy.targets.ort import widen_bfloat16
from doge_deploy.targets.trt import head_norms
from doge_deploy.targets.trt.head_norms import OneHeadNormPass

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "one-kv-head": ({"num_key_value_heads": 1}, "fp32"),
    "grouped-heads-fp16": ({}, "fp16"),
    "kv-head-per-head-bf16": ({"num_key_value_heads": 4}, "bf16"),
}


def inlined(bundle: Bundle) -> ir.Model:
    return common.InlinePass()(ir.load(bundle.path / "model.onnx")).model


def logits(bundle: Bundle, model: ir.Model) -> np.ndarray[Any, Any]:
    data = ir.to_proto(model).SerializeToString()
    if bundle.manifest.dtype == "bfloat16":
        data = widen_bfloat16(data)
    runner = open_runner(bundle, "static", model=data)
    runner.reset(2)
    ids = np.random.default_rng(0).integers(0, 64, (2, 9))
    return np.concatenate([runner.run(ids, [9, 5])[:, -1], runner.run(ids[:, :1])[:, -1]])


def norms(model: ir.Model) -> int:
    return sum(node.op_type == "RMSNormalization" for node in model.graph)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def bundle(request: pytest.FixtureRequest) -> Bundle:
    changes, dtype = request.param
    return open_bundle(shared_bundle(shared_doge(**{**SMALL, **changes}), dtype=dtype))


def difference(bundle: Bundle) -> float:
    """Largest, over the largest logit."""
    plain, joined = inlined(bundle), inlined(bundle)
    assert OneHeadNormPass()(joined).modified
    expected = logits(bundle, plain)
    return float(np.abs(logits(bundle, joined) - expected).max() / np.abs(expected).max())


TOLERANCE = {"float32": 1e-6, "float16": 4e-3, "bfloat16": 3e-2}
"""ONNX Runtime rounds once where it multiplies a norm with its weights, twice where that is a node of its own."""


def test_the_numbers_are_those_of_two_norms(bundle: Bundle) -> None:
    assert difference(bundle) <= TOLERANCE[bundle.manifest.dtype]


def test_each_layer_has_a_norm_less_and_the_same_points() -> None:
    bundle = open_bundle(shared_bundle(shared_doge(**SMALL)))
    layers = bundle.manifest.facts.num_hidden_layers
    plain, joined = inlined(bundle), inlined(bundle)
    OneHeadNormPass()(joined)
    assert norms(plain) - norms(joined) == layers
    points = [sorted((points, value.name, value.shape) for value, points in marked(one)) for one in (plain, joined)]
    assert points[0] == points[1]
    assert not OneHeadNormPass()(joined).modified, "nothing is left to join"


def without_marks(model: ir.Model) -> None:
    for node in model.graph:
        node.metadata_props.clear()


def without_shapes(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Reshape":
            node.outputs[0].shape = None


def another_epsilon(model: ir.Model) -> None:
    for value, points in marked(model):
        if points[0].endswith(".k_norm"):
            value.producer().attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)


@pytest.mark.parametrize("change", [without_marks, without_shapes, another_epsilon], ids=lambda one: one.__name__)
def test_what_is_no_such_pair_stays(change: Any) -> None:
    model = inlined(open_bundle(shared_bundle(shared_doge(**SMALL))))
    change(model)
    before = norms(model)
    assert not OneHeadNormPass()(model).modified and norms(model) == before


def test_weights_in_the_wrong_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = shared_doge(**{**SMALL, "num_key_value_heads": 4})
    real = head_norms._join
    monkeypatch.setattr(head_norms, "_join", lambda query, key: real(*_with_weights_exchanged(query, key)))
    assert difference(open_bundle(shared_bundle(checkpoint))) > 1e-3


def _with_weights_exchanged(query: ir.Node, key: ir.Node) -> tuple[ir.Node, ir.Node]:
    weights = query.inputs[1], key.inputs[1]
    query.replace_input_with(1, weights[1])
    key.replace_input_with(1, weights[0])
    return query, key
