"""Which revision a checkpoint is of, and what becomes of its names and keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from broken_checkpoints import MARCH_KEYS, Damage, config, early, legacy, rename
from golden_legacy import REVISIONS, Golden
from random_doge import SMALL, save_random_doge
from safetensors.torch import load_file

from doge_deploy.checkpoint import check_finite, check_score_range, open_checkpoint
from doge_deploy.checkpoint.legacy import new_name, old_name
from doge_deploy.config.revisions import KEEPS_ALL

FEBRUARY = early(config(num_cdmoe_experts=16348, expert_retrieval_size=64, hidden_bias=False), without=MARCH_KEYS)
MARCH = early(config(dynamic_mask_ratio=0.0, hidden_bias=True, auto_map={}))

DETECTED: dict[str, tuple[Damage, dict[str, object], str]] = {
    "now": (lambda path: None, {}, "transformers"),
    "now-equal-heads": (lambda path: None, {"num_key_value_heads": 4}, "transformers"),
    "2025-08": (legacy, {}, "2025-08"),
    "2025-08-equal-heads": (legacy, {"num_key_value_heads": 4}, "2025-08"),
    "2025-08-one-kv-head": (legacy, {"num_key_value_heads": 1}, "2025-08"),
    "2025-08-moe": (legacy, {"is_moe": True, "num_experts": 20, "num_experts_per_tok": 3}, "2025-08"),
    "2025-08-biases": (legacy, {"attention_bias": True}, "2025-08"),
    "2025-03": (MARCH, {"attention_bias": True, "mlp_bias": True}, "2025-03"),
    "2025-03-equal-heads": (early(config()), {"num_key_value_heads": 4}, "2025-03"),
    "2025-03-untied": (early(config()), {"tie_word_embeddings": False}, "2025-03"),
    "2025-02": (FEBRUARY, {}, "2025-02"),
}


@pytest.mark.parametrize(("damage", "changes", "revision"), DETECTED.values(), ids=DETECTED.keys())
def test_detected(damage: Damage, changes: dict[str, object], revision: str, tmp_path: Path) -> None:
    path = save_random_doge(tmp_path / "checkpoint", **changes)
    stored = {name: value.clone() for name, value in load_file(path / "model.safetensors").items()}
    damage(path)
    checkpoint = open_checkpoint(str(path))
    facts = checkpoint.facts
    assert facts.revision == revision
    assert facts.is_legacy == (revision != "transformers")
    assert facts.qk_norm == (not facts.is_legacy)
    assert facts.num_score_heads == (4 if facts.is_legacy else facts.num_key_value_heads)
    assert facts.keep_window_size == (KEEPS_ALL if revision in ("2025-02", "2025-03") else SMALL["keep_window_size"])
    assert checkpoint.tensors.keys() == {
        name for name in stored if facts.qk_norm or not name.endswith(("q_norm.weight", "k_norm.weight"))
    }
    name = "model.layers.1.input_residual"
    assert torch.equal(checkpoint.read(name), stored[name])
    check_finite(checkpoint)
    check_score_range(checkpoint, "float32")


@pytest.mark.parametrize("name", REVISIONS)
def test_checkpoints_of_the_original_code(name: str) -> None:
    golden = Golden(name)
    facts = open_checkpoint(str(golden.path)).facts
    assert facts.revision == golden.revision
    assert facts.num_score_heads == 4
    if golden.revision != "2025-08":
        assert (facts.bos_token_id, facts.eos_token_id, facts.pad_token_id) == (0, 1, 2)


def test_early_config_classes_had_other_defaults(tmp_path: Path) -> None:
    path = save_random_doge(tmp_path / "checkpoint")
    early(config())(path)
    keys = json.loads((path / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del keys[key]
    (path / "config.json").write_text(json.dumps(keys))
    facts = open_checkpoint(str(path)).facts
    assert (facts.bos_token_id, facts.eos_token_id, facts.pad_token_id) == (0, 1, 2)


def test_names_there_and_back(dense_doge: Path, moe_doge: Path) -> None:
    for path in (dense_doge, moe_doge):
        for name in load_file(path / "model.safetensors"):
            assert new_name(rename(name)) == name
            assert old_name(name) == rename(name)
            assert new_name(name) == name


def test_the_identity_of_the_weights_is_that_of_their_numbers(tmp_path: Path) -> None:
    """A checkpoint of March and the same renamed by hand are the same weights."""
    old, new = (save_random_doge(tmp_path / name) for name in ("old", "new"))
    early(config())(old)
    legacy(new)
    assert open_checkpoint(str(old)).sha256 == open_checkpoint(str(new)).sha256


def test_num_layers(tmp_path: Path) -> None:
    path = save_random_doge(tmp_path / "checkpoint")
    legacy(path)
    facts = open_checkpoint(str(path), num_layers=1).facts
    assert (facts.revision, facts.num_hidden_layers) == ("2025-08", 1)
