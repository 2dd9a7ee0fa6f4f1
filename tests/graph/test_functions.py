"""Bodies of the local functions in ONNX Runtime against their slow twins in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor

from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.config.expert_pairs import candidate_pairs
from doge_deploy.config.keys import TRAINED_ACTIVATIONS
from doge_deploy.config.model import DogeFacts
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph import schemas
from doge_deploy.graph.functions import cdmoe_function, dynamic_mask_attention_function
from doge_deploy.graph.functions.activations import SUPPORTED, activation_function
from doge_deploy.graph.passes.expose_selections import ExposeSelectionsPass
from doge_deploy.model.attention import dynamic_mask_attention, hidden_bias, keep_mask
from doge_deploy.model.moe import cdmoe
from doge_deploy.model.ops import activate
from doge_deploy.targets.ort import widen_bfloat16


@pytest.fixture(scope="module")
def facts(dense_doge: Path) -> DogeFacts:
    return open_checkpoint(str(dense_doge)).facts


def run(
    function: ir.Function, inputs: dict[str, torch.Tensor], attributes: dict[str, Any]
) -> list[np.ndarray[Any, Any]]:
    """One node of the function in ONNX Runtime, with its selection as second output."""
    values = {
        name: ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(t.numpy().dtype)), shape=ir.Shape(t.shape))
        for name, t in inputs.items()
    }
    node = ir.node(function.name, list(values.values()), attributes, domain=schemas.DOMAIN)
    output = node.outputs[0]
    output.name = "output"
    output.dtype = ir.DataType.from_numpy(next(iter(inputs.values())).numpy().dtype)
    graph = ir.Graph(values.values(), [output], nodes=[node], opset_imports={"": 24, schemas.DOMAIN: 1}, name="one")
    model = ir.Model(graph, ir_version=11, functions=[function])
    ExposeSelectionsPass()(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[np.ndarray[Any, Any]] = session.run(None, {name: t.numpy() for name, t in inputs.items()})
    return results


def attention_inputs(
    batch: int, rows: int, slots: int, heads: int, kv_heads: int, levels: int | None
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + slots)
    size = 8

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    score = torch.exp(normal(batch, kv_heads, slots, 1))
    if levels:
        score = torch.randint(1, levels + 1, score.shape, generator=generator).float()
    return {
        "query": normal(batch, heads, rows, size),
        "key": normal(batch, kv_heads, slots, size),
        "value": normal(batch, kv_heads, slots, size),
        "score": score,
        "first_slot": torch.arange(batch) + slots - rows - batch + 1,
    }


@pytest.mark.parametrize("levels", [None, 1, 3], ids=["no-ties", "all-equal", "many-ties"])
@pytest.mark.parametrize("masked", [False, True], ids=["visible", "padding"])
@pytest.mark.parametrize(
    ("rows", "slots"), [(1, 5), (1, 8), (1, 9), (1, 63), (7, 15), (15, 16), (63, 65)], ids=lambda n: str(n)
)
def test_dynamic_mask_attention(facts: DogeFacts, rows: int, slots: int, masked: bool, levels: int | None) -> None:
    window = 8
    inputs = attention_inputs(1, rows, slots, facts.num_attention_heads, facts.num_key_value_heads, levels)
    mask = None
    if masked:
        mask = torch.arange(slots)[None] >= 2
        inputs["key_mask"] = mask
    function = dynamic_mask_attention_function(
        facts, has_key_mask=masked, keep_window=True, hidden_bias=hidden_bias(torch.float32)
    )
    output, kept = run(function, inputs, {"keep_window_size": window, "scale": 0.25})
    arguments = [inputs[name] for name in ("query", "key", "value", "score", "first_slot")]
    expected = dynamic_mask_attention(*arguments, mask, window, 0.25)
    columns = torch.arange(slots)
    visible = columns <= (inputs["first_slot"][:, None] + torch.arange(rows))[:, :, None]
    visible = visible[:, None] if mask is None else visible[:, None] & mask[:, None, None]
    ranked = torch.where(visible, inputs["score"].transpose(2, 3), -1.0)
    np.testing.assert_array_equal(kept, (keep_mask(ranked, window) & visible).numpy())
    np.testing.assert_allclose(output, expected.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda g: f"G={g}")
def test_heads_of_a_group_share_their_bias(facts: DogeFacts, groups: int) -> None:
    changed = replace(facts, num_attention_heads=4, num_key_value_heads=4 // groups)
    inputs = attention_inputs(2, 3, 12, 4, 4 // groups, None)
    function = dynamic_mask_attention_function(
        changed, has_key_mask=False, keep_window=True, hidden_bias=hidden_bias(torch.float32)
    )
    output, _ = run(function, inputs, {"keep_window_size": 5, "scale": 0.25})
    expected = dynamic_mask_attention(*inputs.values(), None, 5, 0.25)
    np.testing.assert_allclose(output, expected.numpy(), rtol=0, atol=2e-6)


def test_a_row_of_padding_stays_finite(facts: DogeFacts) -> None:
    inputs = attention_inputs(1, 2, 4, facts.num_attention_heads, facts.num_key_value_heads, None)
    inputs["first_slot"] = torch.zeros(1, dtype=torch.long)
    inputs["key_mask"] = torch.tensor([[False, True, True, True]])
    for dtype in (torch.float32, torch.float16):
        function = dynamic_mask_attention_function(
            facts, has_key_mask=True, keep_window=False, hidden_bias=hidden_bias(dtype)
        )
        typed = {n: t.to(dtype) if n in ("query", "key", "value") else t for n, t in inputs.items()}
        output, _ = run(function, typed, {"keep_window_size": 0, "scale": 0.25})
        assert np.isfinite(output).all()


@pytest.mark.parametrize("routing", ["reference", "per-token"])
@pytest.mark.parametrize("ties", [False, True], ids=["no-ties", "ties"])
@pytest.mark.parametrize(
    ("experts", "k", "norm"), [(256, 8, False), (20, 3, True), (9, 9, False), (1, 1, False)], ids=lambda v: str(v)
)
def test_cdmoe(facts: DogeFacts, experts: int, k: int, norm: bool, ties: bool, routing: str) -> None:
    changed = replace(facts, is_moe=True, num_experts=experts, num_experts_per_tok=k, norm_topk_prob=norm)
    torch.manual_seed(experts + k)
    router = torch.randn(2, 5, 2 * changed.num_keys)
    inputs = {
        "hidden": torch.randn(2, 5, facts.hidden_size),
        "router_logits": router.round() if ties else router,
        "down_embed": torch.randn(experts, facts.hidden_size),
        "up_embed": torch.randn(experts, facts.hidden_size),
    }
    function = cdmoe_function(changed, routing=routing, pairs=candidate_pairs(k, changed.num_keys))
    attributes = {"num_experts_per_tok": k, "norm_topk_prob": int(norm), "routing": routing, "activation": "silu"}
    output, chosen = run(function, inputs, attributes)
    expected = cdmoe(*inputs.values(), [], k, norm, routing, "silu")
    assert chosen.shape == (10, k)
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reach", [1, 5, 12, 40], ids=lambda n: f"s={n}")
def test_a_sliding_window_hides_by_distance(facts: DogeFacts, reach: int) -> None:
    inputs = attention_inputs(2, 7, 20, facts.num_attention_heads, facts.num_key_value_heads, None)
    function = dynamic_mask_attention_function(
        facts, has_key_mask=False, keep_window=True, hidden_bias=hidden_bias(torch.float32), sliding=True
    )
    output, kept = run(function, inputs, {"keep_window_size": 6, "scale": 0.25, "sliding_window": reach})
    expected = dynamic_mask_attention(*inputs.values(), None, 6, 0.25, reach)
    np.testing.assert_allclose(output, expected.numpy(), rtol=0, atol=2e-6)
    assert kept.sum(-1).max() == min(6, reach)
    for batch, first in enumerate(inputs["first_slot"].tolist()):
        columns = np.flatnonzero(kept[batch, :, 3].any(0))
        assert first + 3 - reach < columns.min() <= columns.max() <= first + 3


def weights_of(name: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Weights of an activation as transformers would hold them in a model of `dtype`; none for most."""
    weights = {
        "prelu": [torch.tensor([-0.7], dtype=dtype)],
        # an eps that can be seen, and numbers that are not those of a new module
        "xielu": [torch.tensor(v, dtype=torch.bfloat16) for v in ([0.31], [-1.7], 0.62, -0.03)],
    }
    return weights.get(name, [])


def run_activation(name: str, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """`x` through the activation's function in ONNX Runtime, weights as initializers."""
    function = activation_function(name)
    value, *initializers = [
        ir.Value(name=f"v{index}", type=ir.TensorType(TorchTensor(t).dtype), shape=ir.Shape(t.shape))
        for index, t in enumerate([x, *weights])
    ]
    for initializer, weight in zip(initializers, weights, strict=True):
        initializer.const_value = TorchTensor(weight)
    node = ir.node(function.name, [value, *initializers], domain=schemas.DOMAIN)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", value.dtype, value.shape
    graph = ir.Graph(
        [value],
        node.outputs,
        nodes=[node],
        initializers=initializers,
        opset_imports={"": 24, schemas.DOMAIN: 1},
        name="one",
    )
    data = ir.to_proto(ir.Model(graph, ir_version=11, functions=[function])).SerializeToString()
    if x.dtype == torch.bfloat16:
        data = widen_bfloat16(data)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    feed = x.float() if x.dtype == torch.bfloat16 else x
    return torch.from_numpy(session.run(None, {"v0": feed.numpy()})[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_activations_are_as_near_to_the_formula_as_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    if name == "xielu" and dtype == torch.float16:
        pytest.skip("transformers makes float32 of it, which no layer takes: an export refuses it")
    x = torch.linspace(-12, 12, 4001).to(dtype)
    weights = weights_of(name, dtype)
    found = run_activation(name, x, weights).double().numpy()
    exact = activate(x.double(), name, weights if name == "xielu" else [w.double() for w in weights]).numpy()
    ulp = torch.finfo(dtype).eps * np.maximum(np.abs(exact), 1.0)
    own = np.abs(activate(x, name, weights).double().numpy() - exact)
    assert (np.abs(found - exact) <= np.maximum(2 * own.max(), 4 * ulp)).all()


@pytest.mark.parametrize("name", sorted(TRAINED_ACTIVATIONS))
def test_a_trained_activation_is_rounded_where_transformers_rounds_it(name: str) -> None:
    x = torch.linspace(-12, 12, 4001).bfloat16()
    weights = weights_of(name, torch.bfloat16)
    found, expected = run_activation(name, x, weights), activate(x, name, weights).float()
    # expm1 of float32 may fall on the other side of a rounding
    assert (found != expected).float().mean() < 1e-3
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_the_weights_of_xielu_are_rounded_as_in_transformers_whatever_they_are() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[torch.isfinite(every) & (every < 1e30)]
    beta, eps = torch.tensor(0.25).bfloat16(), torch.tensor(-1e-6).bfloat16()
    for x in (torch.ones(len(every)), -torch.ones(len(every))):
        weights = [every, every, beta, eps]
        found, expected = run_activation("xielu", x, weights), activate(x, "xielu", weights)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # one rounding to bfloat16 is 2e-3


def test_small_numbers_of_xielu_do_not_cancel() -> None:
    x = -torch.logspace(-5, 0, 2001)
    weights = [torch.tensor(v, dtype=torch.bfloat16) for v in ([0.0], [4.0], 0.0, 0.0)]
    exact = activate(x.double(), "xielu", weights)
    error = (run_activation("xielu", x, weights).double() - exact).abs()
    # in units of the last place of expm1(x), to which exp(x) - 1 would be as coarse as to 1
    ulp = torch.finfo(torch.float32).eps * torch.expm1(x.double()).abs() * 4.0
    assert (error / ulp).max() <= 4


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_activation_bodies_equal_transformers(facts: DogeFacts, name: str) -> None:
    changed = replace(facts, is_moe=True, num_experts=16, num_experts_per_tok=2, hidden_act=name)
    torch.manual_seed(3)
    inputs = {
        "hidden": torch.randn(1, 4, facts.hidden_size),
        "router_logits": torch.randn(1, 4, 8),
        "down_embed": torch.randn(16, facts.hidden_size) / 6,
        "up_embed": torch.randn(16, facts.hidden_size),
    }
    function = cdmoe_function(changed, routing="per-token", pairs=candidate_pairs(2, 4))
    attributes = {"num_experts_per_tok": 2, "norm_topk_prob": 0, "routing": "per-token", "activation": name}
    weights = weights_of(name)
    # NumPy has no bfloat16, and these numbers survive the way through float32
    wide = {f"act_fn_{index}": weight.float() for index, weight in enumerate(weights)}
    output, _ = run(function, {**inputs, **wide}, attributes)
    expected = cdmoe(*inputs.values(), weights, 2, False, "per-token", name)
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_an_activation_without_a_body_is_refused_by_name(facts: DogeFacts) -> None:
    changed = replace(facts, is_moe=True, num_experts=16, num_experts_per_tok=2, hidden_act="softmax")
    with pytest.raises(UnsupportedModelError, match="hidden_act='softmax' cannot be exported"):
        cdmoe_function(changed, routing="per-token", pairs=candidate_pairs(2, 4))
