"""The reference for legacy Doges against numbers of the original code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from broken_checkpoints import legacy, tensors
from bundles import broken_copy, make_bundle
from golden_legacy import REVISIONS, TOLERANCE, Golden
from random_doge import save_random_doge
from transformers import DogeForCausalLM, DynamicCache

from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.cli.main import run_command
from doge_deploy.verify.reference import Reference, ReferenceRows


@pytest.fixture(scope="module", params=REVISIONS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def reference(golden: Golden) -> Reference:
    return Reference(open_checkpoint(str(golden.path)), "float32")


def run(reference: Reference, rows: ReferenceRows, ids: np.ndarray) -> np.ndarray:
    logits, _ = rows.run(ids, np.full(len(ids), ids.shape[1]))
    return torch.stack(logits).numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("text", "abc")
def test_one_call(golden: Golden, reference: Reference, text: str) -> None:
    ids = golden.ids(text)
    assert_close(run(reference, ReferenceRows(reference, len(ids), "right"), ids), golden.tensors[f"{text}.logits"])


def test_prefill_and_decode(golden: Golden, reference: Reference) -> None:
    ids = golden.ids("b")
    rows = ReferenceRows(reference, 1, "right")
    assert_close(run(reference, rows, ids[:, : golden.prefill]), golden.tensors["b.prefill.logits"])
    steps = []
    for i in range(golden.prefill, ids.shape[1]):
        logits, watch = rows.run(ids[:, i : i + 1], np.ones(1, np.int64))
        steps.append(torch.stack(logits).numpy())
    assert_close(np.concatenate(steps, axis=1), golden.tensors["b.decode.logits"])
    present = rows.present(watch.scores)
    for name, expected in golden.caches().items():
        assert np.abs(present[name][0].numpy() - expected).max() <= TOLERANCE


@pytest.mark.parametrize("golden", ["dense"], indirect=True)
def test_a_wider_window_is_another_model(golden: Golden) -> None:
    """What makes `dense` a test of the window: without it the logits beyond move, and only those."""
    checkpoint = open_checkpoint(str(golden.path))
    wide = Reference(replace(checkpoint, facts=replace(checkpoint.facts, keep_window_size=2048)), "float32")
    expected = golden.tensors["b.logits"]
    found = run(wide, ReferenceRows(wide, 1, "right"), golden.ids("b"))
    assert np.abs(found[:, :16] - expected[:, :16]).max() <= TOLERANCE
    assert np.abs(found - expected).max() > 1


def test_biases(tmp_path: Path) -> None:
    """Biases are in no golden; with heads of equal number transformers without its norms gives the answer."""
    path = save_random_doge(tmp_path / "new", attention_bias=True, num_key_value_heads=4)
    tensors(lambda weights: [value.normal_() for name, value in weights.items() if name.endswith(".bias")])(path)
    model = DogeForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    for layer in model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    legacy(path)
    reference = Reference(open_checkpoint(str(path)), "float32")
    ids = np.arange(20)[None] * 3 % 64
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), past_key_values=DynamicCache()).logits.numpy()
    found = run(reference, ReferenceRows(reference, 1, "right"), ids)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def swap_score_heads(model: ir.Model) -> None:
    """Give each query head the score of its neighbour, as a lowering that maps heads wrongly would."""
    function = next(function for function in model.functions.values() if function.name == "DynamicMaskAttention")
    transpose = next(node for node in function if node.op_type == "Transpose")
    heads = ir.node("Constant", [], {"value_ints": [1, 0, 3, 2]})
    gather = ir.node("Gather", [transpose.outputs[0], heads.outputs[0]], {"axis": 1})
    users = [(use.node, use.idx) for use in transpose.outputs[0].uses() if use.node is not gather]
    function.insert_after(transpose, [heads, gather])
    for node, index in users:
        node.replace_input_with(index, gather.outputs[0])


def test_verify_finds_score_heads_that_are_swapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = Golden("dense")
    sound = make_bundle(golden.path, tmp_path / "sound", kv_cache=("growing",))
    wrong = broken_copy(sound, tmp_path / "wrong", graph=swap_score_heads)
    assert run_command(["verify", str(wrong), "--reference", str(golden.path), "--greedy-steps", "4"]) == 1
    assert "does not compute what the reference of legacy Doges (2025-08) computes" in capsys.readouterr().err
