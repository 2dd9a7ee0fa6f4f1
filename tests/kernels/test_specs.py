"""Specs: importable without anything heavy, consistent with the kernels' chains, strict about what they take."""

from __future__ import annotations

import itertools
from importlib.metadata import entry_points
from typing import Any

import pytest
from test_architecture import modules_after

from doge_deploy.config.keys import TRAINED_ACTIVATIONS
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.graph.functions.activations import SUPPORTED
from doge_deploy.kernels.expressions import cdiv, minimum, sym
from doge_deploy.kernels.spec import FLOATS, OperatorPlugin, PluginSpec
from doge_plugins.cdmoe.spec import ACTIVATIONS
from doge_plugins.cdmoe.spec import PLUGIN as CDMOE
from doge_plugins.dynamic_mask_attention.spec import PLUGIN as ATTENTION

OPERATORS: list[OperatorPlugin] = [ATTENTION, CDMOE]
SPECS: list[PluginSpec] = [spec for operator in OPERATORS for spec in operator.specs]
MOE = {"num_experts_per_tok": 8, "norm_topk_prob": 0, "routing": "reference", "activation": "silu"}


def test_a_spec_imports_neither_triton_nor_tensorrt_nor_torch() -> None:
    found = modules_after("import doge_plugins.dynamic_mask_attention.spec, doge_plugins.cdmoe.spec")
    assert not {"triton", "tensorrt", "torch", "onnx", "numpy", "doge_plugins.cdmoe.kernel"} & found


def test_operators_are_entry_points() -> None:
    found = {entry.load().operator for entry in entry_points(group="doge_deploy.plugins")}
    assert {"DynamicMaskAttention", "CDMoE"} <= found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_symbol_of_a_spec_has_a_source(spec: PluginSpec) -> None:
    bound = {size.operands[0] for t in spec.inputs for size in t.shape if getattr(size, "operation", "") == "symbol"}
    bound |= {attribute.name for attribute in spec.attributes}
    used = [size for tensor in (*spec.inputs, *spec.outputs) for size in tensor.shape]
    used += [*spec.scalars.values(), *spec.constants.values()]
    for expression in used:
        assert getattr(expression, "symbols", set()) <= bound, expression
    assert set(spec.static) <= bound
    static = set(spec.static) | {attribute.name for attribute in spec.attributes}
    for name, expression in spec.constants.items():
        assert getattr(expression, "symbols", set()) <= static, f"{name} is not static"


ATTENTION_INPUTS = ("query", "key", "value", "score", "first_slot")
MOE_INPUTS = ("hidden", "router_logits", "down_embed", "up_embed")


@pytest.mark.parametrize("extra", [(), ("key_mask",)], ids=["unmasked", "masked"])
@pytest.mark.parametrize("window", [0, 8], ids=lambda w: f"w={w}")
def test_an_attention_chain_uses_every_input(window: int, extra: tuple[str, ...]) -> None:
    inputs = frozenset([*ATTENTION_INPUTS, *extra])
    check_chain(ATTENTION, {"keep_window_size": window, "scale": 0.5}, inputs)


def test_a_sliding_window_above_the_kept_keys_is_refused() -> None:
    attributes = {"keep_window_size": 8, "scale": 0.5, "sliding_window": 9}
    with pytest.raises(UnsupportedModelError, match=r"sliding_window=9: .* take one up to keep_window_size=8"):
        ATTENTION.chain(attributes, frozenset(ATTENTION_INPUTS))


def test_nothing_is_selected_of_a_sliding_window_that_is_kept_whole() -> None:
    attributes = {"keep_window_size": 8, "scale": 0.5, "sliding_window": 8}
    steps = ATTENTION.chain(attributes, frozenset(ATTENTION_INPUTS))
    assert [step.spec.name for step in steps] == ["DynamicMaskSplit", "DynamicMaskAttend"]
    assert [step.attributes["sliding_window"] for step in steps] == [8, 8]


def test_all_activations_without_weights_are_taken_and_those_with_weights_named() -> None:
    assert set(ACTIVATIONS) == SUPPORTED - set(TRAINED_ACTIVATIONS)
    for name in TRAINED_ACTIVATIONS:
        inputs = frozenset([*MOE_INPUTS, "act_fn_0"])
        with pytest.raises(UnsupportedModelError, match=f"activation='{name}': CDMoE's kernels take gelu, "):
            CDMOE.chain({**MOE, "activation": name}, inputs)


@pytest.mark.parametrize("extra", [(), ("down_scale", "up_scale")], ids=["float", "int8"])
def test_a_cdmoe_chain_uses_every_input(extra: tuple[str, ...]) -> None:
    check_chain(CDMOE, MOE, frozenset([*MOE_INPUTS, *extra]))


def check_chain(operator: OperatorPlugin, attributes: dict[str, Any], inputs: frozenset[str]) -> None:
    known = set(inputs)
    used: set[str] = set()
    for step in operator.chain(attributes, inputs):
        assert step.spec in operator.specs
        assert len(step.inputs) == len(step.spec.inputs)
        assert len(step.outputs) == len(step.spec.outputs)
        assert set(step.attributes) == {attribute.name for attribute in step.spec.attributes}
        assert set(step.inputs) <= known
        used |= set(step.inputs)
        known |= set(step.outputs)
    assert "output" in known
    assert inputs <= used


def select() -> PluginSpec:
    return next(spec for spec in ATTENTION.specs if spec.name == "DynamicMaskSelect")


def test_binding_gives_shapes_scalars_and_grid() -> None:
    binding = select().bind([(2, 3, 100, 1), (2,), (2, 6, 65, 64)], {"keep_window_size": 20, "rows": 64}, "float16")
    assert binding.output_shapes == [(2, 3, 65), (2, 3, 65), (2, 3, 2, 83), (2, 3, 2)]
    assert binding.scalars == [65, 100]
    assert binding.grid(binding.tile(87)) == (2, 3, 2)


@pytest.mark.parametrize(
    ("shapes", "attributes", "dtype", "message"),
    [
        ([(2, 3, 100, 1), (2,)], {}, "float16", "2 inputs; takes 3: score"),
        ([(2, 3, 100, 1), (3,), (2, 6, 65, 64)], {}, "float16", "first_slot axis 0 is 3, but B is 2 elsewhere"),
        ([(2, 3, 100, 2), (2,), (2, 6, 65, 64)], {}, "float16", "score axis 3 is 2; 1 = 1 is needed"),
        ([(2, 3, 100, 1), (2,), (2, 6, 65, 64)], {}, "float64", "T is float64; takes float32"),
        ([(2, 3, 100, 1), (2,), (2, 6, 65, 64)], {"rows": 7}, "float16", "rows=7 must be one of 16, 32, 64"),
        ([(2, 3, 100, 1), (2,), (2, 6, 65, 64)], {"row": 1}, "float16", "unknown attribute 'row'; known: keep_window"),
        ([(2, 3, 100, 1), (2,), (2, 6, 65, 64)], {"keep_window_size": 0}, "float16", "keep_window_size at least 1"),
    ],
    ids=["inputs", "batch", "constant", "dtype", "legal", "unknown", "limit"],
)
def test_a_node_that_does_not_fit_is_refused_by_name(
    shapes: list[tuple[int, ...]], attributes: dict[str, Any], dtype: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        select().bind(shapes, {"keep_window_size": 20, "rows": 64, **attributes}, dtype)


def test_expressions_read_like_formulas_and_work_in_any_algebra() -> None:
    expression = minimum(sym("K"), sym("w") + 64 - 1)
    assert str(expression) == "min(K, (w + 64) - 1)"
    assert expression.symbols == {"K", "w"}
    assert expression.evaluate({"K": 100, "w": 20}) == 83
    assert cdiv(sym("Q"), 64).evaluate({"Q": 65}) == 2
    words = {name: (lambda a, b, name=name: f"{name}({a},{b})") for name in ("add", "sub", "min")}
    assert expression.evaluate({"K": "k", "w": "w"}, words) == "min(k,sub(add(w,64),1))"


@pytest.mark.parametrize("rows", [1, 8, 2048])
def test_a_step_is_split_among_programs_and_a_prompt_has_one_for_each_tile(rows: int) -> None:
    """At w = 2048; what a prompt's 17 programs of the first kernel do is to return."""
    split, attend = (spec for spec in ATTENTION.specs if spec.name.endswith("Selected"))
    attributes = {"scale": 0.1, "rows": 64}
    lists = [(1, 1, rows), (1, 1, rows), (1, 1, -(-rows // 64), 2111), (1, 1, -(-rows // 64))]
    shapes = [(1, 2, rows, 128), (1, 1, 4096, 128), (1, 1, 4096, 128), (1, 1, 4096, 1), (1,), *lists]
    parts = split.bind(shapes, {**attributes, "split_keys": 128}, "float16")
    assert parts.grid(parts.tile(87)) == (17, 1, 1)
    whole = attend.bind([*shapes, *parts.output_shapes], attributes, "float16")
    assert whole.grid(whole.tile(87)) == (-(-rows // 32), 2, 1)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("size", [8, 64, 96, 128, 256])
@pytest.mark.parametrize("name", ["DynamicMaskSplitSelected", "DynamicMaskAttendSelected"])
def test_a_tile_of_rows_lies_within_one_list(name: str, size: int, groups: int) -> None:
    spec = next(spec for spec in ATTENTION.specs if spec.name == name)
    for arch, dtype, rows in itertools.product((75, 80, 86, 87, 89, 90, 100, 110, 120, 121), FLOATS, (16, 32, 64)):
        values = {"H": groups * 2, "Hkv": 2, "S": 2, "D": size, "rows": rows}
        constants = spec.tiler(arch, values, dtype).constants
        assert rows % constants["BLOCK_ROWS"] == 0
        assert constants["BLOCK_ROWS"] * constants["PACK"] >= 16
