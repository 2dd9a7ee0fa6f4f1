"""Verification of what is right, in every dtype, layout and routing; and its reports."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle, shared_bundle
from random_doge import DYNAMIC, LONGROPE, SMALL, SMALL_MOE, save_random_doge
from sweeps import cases

from doge_deploy.cli.main import run_command
from doge_deploy.verify.report import Report
from doge_deploy.verify.run import verify

BOTH = ("static", "growing")

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense-fp32-all": ({}, {"logits": "all"}),
    "dense-fp16": ({}, {"dtype": "fp16"}),
    "dense-bf16": ({}, {"dtype": "bf16", "logits": "all"}),
    "moe-reference": (SMALL_MOE, {}),
    "moe-per-token": (SMALL_MOE, {"routing": "per-token", "logits": "all"}),
    "moe-per-token-bf16": (SMALL_MOE, {"routing": "per-token", "dtype": "bf16"}),
    "prelu-fp16": ({"hidden_act": "prelu"}, {"dtype": "fp16"}),
    "prelu-bf16": ({"hidden_act": "prelu"}, {"dtype": "bf16"}),
    "prelu-moe": ({**SMALL_MOE, "hidden_act": "prelu"}, {}),
    "prelu-moe-fp16": ({**SMALL_MOE, "hidden_act": "prelu"}, {"dtype": "fp16", "logits": "all"}),
    "xielu": ({"hidden_act": "xielu"}, {"logits": "all"}),
    "xielu-bf16": ({"hidden_act": "xielu"}, {"dtype": "bf16"}),
    "xielu-moe": ({**SMALL_MOE, "hidden_act": "xielu"}, {}),
    "xielu-moe-per-token-bf16": ({**SMALL_MOE, "hidden_act": "xielu"}, {"routing": "per-token", "dtype": "bf16"}),
    "window-1": ({"keep_window_size": 1}, {}),
    "window-unreachable": ({"keep_window_size": 128}, {}),
    "moe-window-unreachable": ({**SMALL_MOE, "keep_window_size": 128}, {}),
    "untied-biases": ({"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, {}),
    "one-kv-head-per-head": ({"num_key_value_heads": 4}, {"logits": "all"}),
    "sliding": ({"sliding_window": 12}, {}),
    "sliding-below-the-window": ({"sliding_window": 6}, {"logits": "all"}),
    "sliding-of-two-fp16": ({"sliding_window": 2}, {"dtype": "fp16"}),
    "sliding-beyond-capacity": ({"sliding_window": 64, "max_position_embeddings": 64}, {}),
    "sliding-moe": ({**SMALL_MOE, "sliding_window": 12}, {}),
    "dynamic-beyond": ({"max_position_embeddings": 16, "rope_parameters": DYNAMIC}, {"max_length": 64}),
    "longrope-beyond-bf16": ({"rope_parameters": LONGROPE}, {"max_length": 64, "dtype": "bf16"}),
    "dynamic-beyond-moe": (
        {**SMALL_MOE, "max_position_embeddings": 16, "rope_parameters": DYNAMIC},
        {"max_length": 64, "logits": "all"},
    ),
    "dynamic-beyond-sliding-moe-per-token": (
        {**SMALL_MOE, "max_position_embeddings": 16, "rope_parameters": DYNAMIC, "sliding_window": 12},
        {"max_length": 64, "routing": "per-token"},
    ),
    "short-capacity": ({}, {"max_length": 12}),
}


ALWAYS = (
    "dense-fp16 prelu-moe-fp16 window-1 untied-biases one-kv-head-per-head sliding-of-two-fp16 "
    "sliding-beyond-capacity sliding-moe longrope-beyond-bf16 dynamic-beyond-moe short-capacity"
).split()
"""Each thing that a graph can have, at least once; routing per token is in test_tasks.py and runtime/test_window.py."""


@pytest.mark.parametrize(("config", "options"), cases(CASES, ALWAYS))
def test_a_good_bundle_passes(config: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = save_random_doge(tmp_path / "checkpoint", **{**SMALL, "vocab_size": 256, **config})
    bundle = make_bundle(checkpoint, tmp_path / "bundle", kv_cache=BOTH, **options)
    report = verify(bundle, reference=str(checkpoint), greedy_steps=16)
    assert not [(r.layout, r.case, r.failures) for r in report.results if not r.passed]
    assert report.passed
    assert {result.layout for result in report.results} == set(BOTH)
    assert ("window K=w+1" in report.skipped) == (options.get("max_length", 64) <= config.get("keep_window_size", 8))


@pytest.fixture(scope="module")
def moe_report(tiny_moe_bundle: Path) -> Report:
    return verify(tiny_moe_bundle, layouts=("static",), greedy_steps=16)


def test_the_demo_checkpoint_uses_its_mask_and_its_router(moe_report: Report) -> None:
    rows = {result.case: result for result in moe_report.results}
    assert moe_report.passed
    assert rows["window K=w+1"].selected
    assert rows["natural text"].selected == "certificate"
    assert rows["natural text"].tied_rows > 0, "repeated tokens tie in layer 0"


def test_transformers_disagreement_with_itself_is_reported_apart(moe_report: Report) -> None:
    itself = moe_report.reference_itself
    assert itself is not None
    assert itself.prefill_against_decode > 1e-3, "its routing mixes the tokens of a prefill"


def test_json_and_junit(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--junit", str(tmp_path / "r.xml")]
    assert run_command(["verify", str(tiny_bundle), "--layout", "growing", "--greedy-steps", "4", *files]) == 0
    output = capfd.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["passed"] is True
    case = report["cases"][0]
    assert {"logits", "present.0.key", "present.2.value"} <= set(case["quantities"])
    assert {"max_abs", "max_rel", "cosine", "worst_index", "allowed"} <= set(case["quantities"]["logits"])
    assert {"kl_divergence", "top1", "tied_rows"} <= set(case)
    assert report["tolerances"]["logits"]["reason"]
    suite = ET.parse(tmp_path / "r.xml").getroot()
    assert suite.get("failures") == "0"
    names = [entry.get("name") for entry in suite]
    assert names[0] == "weights"
    for name in names[1:]:
        assert f" {name} " in output


def test_another_checkpoint_is_not_a_reference(
    tiny_bundle: Path, dense_doge: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["verify", str(tiny_bundle), "--reference", str(dense_doge)]) == 3
    assert "is not the checkpoint of" in capfd.readouterr().err


def test_a_bundle_from_a_directory_asks_for_its_reference(dense_doge: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = shared_bundle(dense_doge)
    assert run_command(["verify", str(bundle)]) == 2
    assert "--reference MODEL" in capfd.readouterr().err


def test_report_that_cannot_be_written_is_one_line(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(tiny_bundle), "--layout", "static", "--greedy-steps", "1"]
    assert run_command([*arguments, "--json", str(tmp_path / "no" / "r.json")]) == 2
    assert "cannot be written" in capfd.readouterr().err


def test_a_moved_bundle_still_verifies(tiny_bundle: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_bundle, tmp_path / "elsewhere"))
    assert verify(moved, layouts=("growing",), greedy_steps=1).passed
