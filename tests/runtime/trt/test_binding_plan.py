"""The binding plan: from an engine's record, against the bundle's signature."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from bundles import own_bundle
from engine_stand_ins import DECODE, PREFILL, SHARED, axes, record_of

from doge_deploy.bundle.engine_record import EngineProfile, EngineTensor
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import BrokenBundleError, UsageError
from doge_deploy.runtime.trt.plan import BindingPlan, make_plan, make_prefill_plan, nbytes
from doge_deploy.runtime.trt.product import obstacle


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def plan_of(bundle: Bundle, **changes: Any) -> BindingPlan:
    return make_plan(record_of(bundle, **changes), bundle.layout("static").signature)


def test_every_tensor_has_one_purpose(bundle: Bundle) -> None:
    plan, signature = plan_of(bundle), bundle.layout("static").signature
    planned = [*(tensor.name for tensor in plan.inputs), *(cache.past for cache in plan.caches)]
    assert planned == [spec.name for spec in signature.inputs]
    assert [*(tensor.name for tensor in plan.outputs), *(cache.present for cache in plan.caches)] == [
        spec.name for spec in signature.outputs
    ]


def test_caches_are_planned_to_the_byte(bundle: Bundle) -> None:
    plan, facts, slots = plan_of(bundle), bundle.manifest.facts, bundle.manifest.max_length
    per_layer = facts.num_key_value_heads * slots * (2 * facts.head_dim + 1) * 4
    assert plan.cache_bytes(3) == 3 * facts.num_hidden_layers * per_layer
    assert plan.caches[0].shape(3) == (3, facts.num_key_value_heads, slots, facts.head_dim)


def test_shapes_of_a_call(bundle: Bundle) -> None:
    plan = plan_of(bundle)
    shapes = plan.call_shapes(2, 5)
    assert shapes["input_ids"] == (2, 5) and shapes["write_indices"] == (2,)
    assert shapes["logits"] == (2, 5, bundle.manifest.facts.vocab_size)
    inputs = plan.input_shapes(2, 5)
    assert "logits" not in inputs and inputs[plan.caches[0].past] == plan.caches[0].shape(2)


def test_the_engines_dtype_counts(bundle: Bundle) -> None:
    narrow = EngineTensor(name="input_ids", dtype="int32", shape=("batch_size", "sequence_length"))
    inputs = tuple(narrow if tensor.name == "input_ids" else tensor for tensor in record_of(bundle).inputs)
    plan = plan_of(bundle, inputs=inputs)
    assert nbytes(plan.inputs[0], (2, 5)) == math.prod((2, 5)) * 4


@pytest.mark.parametrize(
    ("profiles", "batch", "width", "index"),
    [
        ((PREFILL, DECODE), 1, 1, 1),
        ((PREFILL, DECODE), 1, 2, 0),
        ((PREFILL, DECODE), 4, 1, 1),
        ((DECODE, PREFILL), 2, 512, 1),
        ((SHARED,), 1, 1, 0),
        ((SHARED,), 2, 512, 0),
    ],
)
def test_profile(bundle: Bundle, profiles: tuple[EngineProfile, ...], batch: int, width: int, index: int) -> None:
    assert plan_of(bundle, profiles=profiles).profile(batch, width) == index


def test_a_call_that_no_profile_takes_is_told_what_one_would(bundle: Bundle) -> None:
    plan = plan_of(bundle)
    with pytest.raises(UsageError) as caught:
        plan.profile(3, 7)
    assert "no profile takes 3 rows of 7 tokens" in str(caught.value)
    assert "built for 1 to 2 rows of 1 to 512 tokens or 1 to 4 rows of 1 token" in str(caught.value)
    one = EngineProfile(name="shared", axes=axes((1, 1, 1), (1, 1, 8)))
    assert "for 1 row of 1 to 8 tokens" in str(plan_of(bundle, profiles=(one,)).refusal(1, 9))
    assert plan.refusal(4, 1) is None


def without(tensors: tuple[EngineTensor, ...], name: str) -> tuple[EngineTensor, ...]:
    return tuple(tensor for tensor in tensors if tensor.name != name)


def test_a_record_that_does_not_belong_to_the_graph_is_refused(bundle: Bundle) -> None:
    record = record_of(bundle)
    other = EngineTensor(name="positions", dtype="int64", shape=("batch_size",))
    narrow = EngineTensor(name="past_key_values.0.key", dtype="float8", shape=(1, 2, 3, 4))
    aliases = {present: past for present, past in record.aliases.items() if present != "present.1.value"}
    changes: dict[str, Any] = {
        "inputs": (*without(without(record.inputs, "write_indices"), narrow.name), narrow, other),
        "outputs": without(record.outputs, "logits"),
        "aliases": aliases,
    }
    with pytest.raises(BrokenBundleError) as caught:
        plan_of(bundle, **changes)
    for words in (
        "no input write_indices",
        "unknown input positions",
        "no output logits",
        "past_key_values.0.key is [1, 2, 3, 4], the graph's",
        "past_key_values.0.key is float8, must be one of",
        "present.1.value is not written in place of past_key_values.1.value",
        "build it again",
    ):
        assert words in str(caught.value)


@pytest.mark.tensorrt
def test_an_engine_that_was_built_can_be_bound(tmp_path: Path) -> None:
    """The record of the real builder, not one that a test made up."""
    pytest.importorskip("tensorrt_rtx")
    path = own_bundle(tmp_path / "doge-tiny", "doge-tiny", dtype="fp16")
    assert run_command(["build", str(path), "--target", "trt-rtx", "--batch-size", "1,1,2"]) == 0
    built = open_bundle(path)
    signature, layers = built.layout("static").signature, built.manifest.facts.num_hidden_layers
    plan, prefill = make_plan(built.engine(), signature), make_prefill_plan(built.engine(), signature)
    assert prefill is not None
    for one in (plan, prefill):
        assert [tensor.name for tensor in one.inputs] == ["input_ids", "write_indices", "sequence_lengths"]
        assert len(one.caches) == 3 * layers and one.refusal(3, 1)
    assert plan.profile(2, 1) == 0 and prefill.profile(2, built.manifest.max_length) == 0
    assert plan.cache_bytes(2) == prefill.cache_bytes(2) == 2 * layers * 2 * 64 * (2 * 32 * 2 + 2 * 4)
    assert obstacle(built.engine(), "8.9", built.engine().version) is None
