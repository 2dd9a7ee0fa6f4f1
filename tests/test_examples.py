"""Examples run as their pages say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import shared_bundle
from random_doge import shared_doge

from doge_deploy.checkpoint import open_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str) -> None:
    result = subprocess.run([sys.executable, str(EXAMPLES / script), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_example_has_a_page() -> None:
    folders = [path for path in EXAMPLES.iterdir() if path.is_dir()]
    assert folders
    assert all((folder / "README.md").is_file() for folder in folders)


@pytest.mark.sweep
def test_demo_checkpoints_can_be_trained_anew(tmp_path: Path) -> None:
    run("01_train_demo_checkpoints/train.py", "--steps", "2", "--output", str(tmp_path))
    for name in ("doge-tiny", "doge-tiny-moe"):
        assert open_checkpoint(str(tmp_path / name)).facts == open_checkpoint(name).facts


@pytest.mark.parametrize("size", [pytest.param("20M", marks=pytest.mark.sweep), "20M-MoE"])
def test_published_sizes_are_valid_checkpoints(size: str, tmp_path: Path) -> None:
    run("02_published_sizes/make_random.py", size, str(tmp_path / size), "--dtype", "bfloat16")
    facts = open_checkpoint(str(tmp_path / size)).facts
    assert (facts.hidden_size, facts.num_hidden_layers, facts.is_moe) == (256, 8, size.endswith("MoE"))


@pytest.mark.sweep
def test_text_beyond_the_original_length_is_that_of_transformers(tmp_path: Path) -> None:
    from bundles import make_bundle
    from random_doge import save_random_doge

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = {"num_hidden_layers": 1, "vocab_size": 256, "keep_window_size": 2048, "rope_parameters": rope}
    checkpoint = save_random_doge(tmp_path / "checkpoint", **config)
    make_bundle(checkpoint, tmp_path / "bundle", kv_cache=("static", "growing"), max_length=256)
    run("04_rope_beyond_its_length/compare.py", str(checkpoint), str(tmp_path / "bundle"))


@pytest.mark.parametrize("name", ["doge-tiny", "doge-tiny-moe"])
def test_demo_checkpoints_are_small_and_use_what_makes_a_doge(name: str) -> None:
    checkpoint = open_checkpoint(name)
    assert sum(file.stat().st_size for file in checkpoint.path.iterdir()) <= 3_000_000
    scores = [checkpoint.read(f"model.layers.{i}.self_attn.A") for i in range(checkpoint.facts.num_hidden_layers)]
    assert all((a.abs() > 0.05).all() for a in scores), "A was trained away from zero"
    assert checkpoint.facts.keep_window_size < checkpoint.facts.max_position_embeddings


@pytest.mark.parametrize("options", [(), ("--prefill", "16")], ids=["decode", "prefill"])
def test_shares_of_operators_add_up(options: tuple[str, ...], tiny_moe_bundle: Path) -> None:
    script = EXAMPLES / "03_benchmarks" / "operator_times.py"
    command = [sys.executable, str(script), str(tiny_moe_bundle), "--top", "3", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()[2:]]
    assert len(rows) == 5
    *kinds, whole = rows
    assert sum(int(row[1]) for row in kinds) == int(whole[1])
    assert abs(sum(int(row[3].rstrip("%")) for row in kinds) - 100) <= 2


def test_parts_of_a_step_add_up() -> None:
    script = EXAMPLES / "03_benchmarks" / "operator_times.py"
    whole = shared_bundle(shared_doge(head_dim=16, keep_window_size=64, vocab_size=256))
    result = subprocess.run(
        [sys.executable, str(script), str(whole), "--in-step", "--rounds", "1"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    table, _, small = result.stdout.partition("\n\n")
    *parts, sum_of_all = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    nodes = [int(row[1]) for row in parts if row[1].isdigit()]
    assert sum(nodes) == int(sum_of_all[1]) and "GroupQueryAttention" in result.stdout and "us, " in small
    assert abs(sum(float(row[2]) for row in parts) - float(sum_of_all[2])) <= 0.1 * len(parts)


@pytest.mark.parametrize("options", [["--prefill", "4"], ["--portable"]], ids=" ".join)
def test_only_steps_of_the_lowered_graph_are_taken_apart(options: list[str], tiny_moe_bundle: Path) -> None:
    script = EXAMPLES / "03_benchmarks" / "operator_times.py"
    command = [sys.executable, str(script), str(tiny_moe_bundle), "--in-step", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "decode steps of the lowered graph" in result.stderr


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="ties a process to one of two cores or more"
)
def test_steps_beside_a_busy_core_are_timed() -> None:
    script = EXAMPLES / "03_benchmarks" / "busy_core.py"
    command = [sys.executable, str(script), str(shared_bundle("doge-tiny", logits="last")), "--rounds", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()[2:]]
    assert [row[1].split(", ")[1] for row in rows] == ["50 us", "0 us", "1000 us", "50 us"]
    for _, _, idle, busy, ratio in rows:
        first, second = (float(times.split(" ")[0]) for times in (idle, busy))
        assert first > 0 and abs(float(ratio.split(" ")[0]) - second / first) < 0.3 * second / first


def _capacity(*arguments: str) -> str:
    script = EXAMPLES / "07_capacity" / "capacity.py"
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_capacity_on_paper_is_what_its_page_says() -> None:
    """The smallest command of the page, to the last digit: there is no clock and no machine in it."""
    page = (EXAMPLES / "07_capacity" / "README.md").read_text(encoding="utf-8")
    printed = _capacity(
        "predict", str(EXAMPLES / "07_capacity" / "20M-int8.json"), "--clients", "1,8", "--seconds", "1"
    )
    assert printed.count("\n") == 4 and printed in page


def test_more_replicas_answer_more_users_sooner() -> None:
    table = str(EXAMPLES / "07_capacity" / "20M-int8.json")
    printed = _capacity("users", table, "--users", "400", "--pause", "4", "--replicas", "1,4", "--seconds", "6")
    few, many = (line.strip("| ").split(" | ") for line in printed.splitlines()[2:])
    assert float(few[2].split(", ")[1]) > 2 * float(many[2].split(", ")[1])
    assert float(many[1]) > float(few[1])
