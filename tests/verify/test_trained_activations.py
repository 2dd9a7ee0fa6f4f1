"""Activations with weights of their own, one set a layer: what verification sees of them, and who cannot take them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from broken_checkpoints import legacy
from bundles import broken_copy, make_bundle
from random_doge import SMALL, SMALL_MOE, save_random_doge
from safetensors import safe_open
from sweeps import fixture_cases

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.cli.main import run_command
from doge_deploy.config.keys import TRAINED_ACTIVATIONS
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.preflight import check_file
from doge_deploy.targets.trt.layout import lower_layout
from doge_deploy.verify.run import verify

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}-{kind}": (name, config)
    for name in TRAINED_ACTIVATIONS
    for kind, config in (("dense", SMALL), ("moe", SMALL_MOE))
}


@pytest.fixture(scope="module", params=fixture_cases(CASES, always=["prelu-dense", "xielu-moe"]))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    name, config = request.param
    path = tmp_path_factory.mktemp(name)
    checkpoint = save_random_doge(path / "checkpoint", **{**config, "vocab_size": 256, "hidden_act": name})
    return checkpoint, make_bundle(checkpoint, path / "bundle", kv_cache=("static", "growing"))


def exchange(model: ir.Model) -> int:
    """Let two layers exchange the weights of their activations; the number of inputs that changed."""
    weights = {name: value for name, value in model.graph.initializers.items() if ".act_fn." in name}
    other = {name: name.replace(".0.", ".X.").replace(".1.", ".0.").replace(".X.", ".1.") for name in weights}
    changed = 0
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in weights:
                node.replace_input_with(index, weights[other[value.name]])
                changed += 1
    return changed


@pytest.mark.parametrize("portable", [False, True], ids=["lowered", "portable"])
def test_exchanged_weights_of_two_layers_are_seen(made: tuple[Path, Path], portable: bool, tmp_path: Path) -> None:
    checkpoint, bundle = made

    def edit(model: ir.Model) -> None:
        assert exchange(model)

    broken = broken_copy(bundle, tmp_path / "b", graph=edit, portable=portable)
    report = verify(broken, reference=str(checkpoint), layouts=("static",), greedy_steps=2, portable=portable)
    failed = {result.case for result in report.results if not result.passed}
    assert {"prefill", "decode"} <= failed, "the weights are all there, so the numbers must show it"


def test_experts_alone_show_it_too(made: tuple[Path, Path], tmp_path: Path) -> None:
    """In a mixture the same weights go to two places; only that of the experts is broken here."""
    checkpoint, bundle = made
    if not open_bundle(bundle).manifest.facts.is_moe:
        pytest.skip("dense: no experts")

    def edit(model: ir.Model) -> None:
        first, second = (node for node in model.graph if node.op_type == "CDMoE")
        for index in range(4, len(first.inputs)):
            values = first.inputs[index], second.inputs[index]
            first.replace_input_with(index, values[1])
            second.replace_input_with(index, values[0])

    broken = broken_copy(bundle, tmp_path / "b", graph=edit, portable=True)
    report = verify(broken, reference=str(checkpoint), layouts=("static",), greedy_steps=2, portable=True)
    assert "prefill" in {result.case for result in report.results if not result.passed}


def test_every_layer_has_its_weights_in_the_file(made: tuple[Path, Path]) -> None:
    checkpoint, bundle = made
    facts = open_checkpoint(str(checkpoint)).facts
    with safe_open(bundle / "weights.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys() if ".act_fn." in name}  # noqa: SIM118
    assert set(found) == {
        f"model.layers.{layer}.mlp.act_fn.{name}"
        for layer in range(facts.num_hidden_layers)
        for name in TRAINED_ACTIVATIONS[facts.hidden_act]
    }
    expected = torch.bfloat16 if facts.hidden_act == "xielu" else torch.float32
    assert {tensor.dtype for tensor in found.values()} == {expected}


def test_gate_and_up_are_still_packed(made: tuple[Path, Path]) -> None:
    record = open_bundle(made[1]).layout("static").lowered.get("ort")
    assert record is not None
    assert "PackLinearsPass" in record.applied


def test_the_kernel_of_the_experts_refuses_it_by_name(made: tuple[Path, Path]) -> None:
    bundle = open_bundle(made[1])
    facts = bundle.manifest.facts
    refusal = rf"CDMoE\S*: activation='{facts.hidden_act}': CDMoE's kernels take gelu"
    for ask in (lambda: check_file(made[1]), lambda: lower_layout(bundle, bundle.layout("static"), use_plugins=True)):
        with pytest.raises(UnsupportedModelError, match=refusal) if facts.is_moe else nullcontext():
            ask()


def test_tensorrts_graph_computes_the_same(made: tuple[Path, Path]) -> None:
    checkpoint, bundle = made
    arguments = ["verify", str(bundle), "--reference", str(checkpoint), "--lowering", "--greedy-steps", "2"]
    assert run_command(arguments) == 0


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights_leave_it_alone(quantize: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, _ = made
    bundle = make_bundle(checkpoint, tmp_path / "b", quantize=quantize, block_size=16)
    with safe_open(bundle / "weights.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if ".act_fn." in name]  # noqa: SIM118
    assert all(name.rsplit(".", 1)[1] in ("weight", "alpha_p", "alpha_n", "beta", "eps") for name in names)
    report = verify(bundle, reference=str(checkpoint), layouts=("static",), greedy_steps=2, portable=True)
    assert not [(r.case, r.failures) for r in report.results if not r.passed]


def test_xielu_in_float16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers fails there: its weights stay bfloat16, and make float32 of a float16 state."""
    from transformers import DogeForCausalLM

    checkpoint = save_random_doge(tmp_path / "c", hidden_act="xielu")
    model = DogeForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, attn_implementation="eager")
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        model(torch.tensor([[3, 4]]))
    capsys.readouterr()
    assert run_command(["export", str(checkpoint), "-o", str(tmp_path / "b"), "--dtype", "fp16"]) == 3
    assert "hidden_act='xielu' with dtype=fp16" in capsys.readouterr().err


def test_a_legacy_doge_may_have_prelu(tmp_path: Path) -> None:
    checkpoint = save_random_doge(tmp_path / "c", **{**SMALL, "vocab_size": 256, "hidden_act": "prelu"})
    legacy(checkpoint)
    bundle = make_bundle(checkpoint, tmp_path / "b")
    assert open_bundle(bundle).manifest.facts.is_legacy
    report = verify(bundle, reference=str(checkpoint), greedy_steps=4)
    assert not [(r.case, r.failures) for r in report.results if not r.passed]
    assert report.passed
