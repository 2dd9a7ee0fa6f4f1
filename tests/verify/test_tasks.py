"""Tasks other than the causal language model: exported, verified, and refused where the checkpoint is for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import broken_copy, edit_tensor, make_bundle
from random_doge import DYNAMIC, SMALL, SMALL_MOE, random_doge, save_random_doge
from transformers import DogeForSequenceClassification

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import UsageError
from doge_deploy.model.ops import last_unlike
from doge_deploy.runtime.ort import open_runner
from doge_deploy.verify.run import verify

CLASSES = "sequence-classification"

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "classes": (CLASSES, CLASSES, {}, {}),
    "five-classes-without-padding-token-fp16": (
        CLASSES,
        CLASSES,
        {"pad_token_id": None, "num_labels": 5},
        {"dtype": "fp16"},
    ),
    "classes-moe-per-token": (CLASSES, CLASSES, SMALL_MOE, {"routing": "per-token"}),
    "features-of-a-classifier": (CLASSES, "features", {}, {}),
    "features-of-a-language-model": ("causal-lm", "features", {"tie_word_embeddings": False}, {}),
    "features-of-a-bare-model-sliding-bf16": ("features", "features", {"sliding_window": 12}, {"dtype": "bf16"}),
    "features-moe-dynamic-beyond": (
        "features",
        "features",
        {**SMALL_MOE, "max_position_embeddings": 16, "rope_parameters": DYNAMIC},
        {"max_length": 64},
    ),
}


@pytest.mark.parametrize(("saved", "task", "config", "options"), CASES.values(), ids=CASES.keys())
def test_a_good_bundle_passes(
    saved: str, task: str, config: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = save_random_doge(tmp_path / "checkpoint", task=saved, **{**SMALL, "vocab_size": 256, **config})
    bundle = make_bundle(checkpoint, tmp_path / "bundle", task=task, **options)
    report = verify(bundle, reference=str(checkpoint))
    assert not [(r.case, r.failures) for r in report.results if not r.passed]
    assert report.passed
    batched = config.get("pad_token_id", 2) is not None
    assert ("batch of 3" in {result.case for result in report.results}) == batched


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    folder = tmp_path_factory.mktemp("classifier")
    checkpoint = save_random_doge(folder / "checkpoint", task=CLASSES)
    return checkpoint, make_bundle(checkpoint, folder / "bundle", task=CLASSES)


def test_a_changed_score_head_is_found(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    def damage(tensor: torch.Tensor) -> None:
        tensor[3, 1] *= 1.5

    checkpoint, bundle = classifier
    broken = broken_copy(bundle, tmp_path / "broken", weights=lambda path: edit_tensor(path, "score.weight.T", damage))
    report = verify(broken, reference=str(checkpoint))
    assert not report.weights.passed
    assert {result.case for result in report.results if not result.passed} >= {"prefill", "natural text"}


PAD = 2
TEXTS = {
    "right": [[5, 6, 7, PAD, PAD], [5, 6, PAD, PAD, PAD]],
    "left": [[PAD, PAD, 5, 6, 7], [PAD, PAD, PAD, PAD, 9]],
    "inside": [[5, PAD, 6, PAD, PAD], [PAD, 5, PAD, 6, 7]],
    "nothing-else": [[PAD, PAD, PAD, PAD, PAD], [5, PAD, PAD, PAD, PAD]],
}


@pytest.mark.parametrize("ids", TEXTS.values(), ids=TEXTS.keys())
@torch.no_grad()
def test_pooling_takes_the_rightmost_token_that_is_not_padding(
    classifier: tuple[Path, Path], ids: list[list[int]]
) -> None:
    model = DogeForSequenceClassification.from_pretrained(classifier[0], attn_implementation="eager")
    tokens = torch.tensor(ids)
    mask = (tokens != PAD).long()
    hidden = model.model(tokens, attention_mask=mask).last_hidden_state
    expected = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(model.score(last_unlike(hidden, tokens, PAD))[:, 0], expected)
    session = open_runner(open_bundle(classifier[1])).session
    (logits,) = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-5)


def test_without_a_padding_token_a_call_has_one_row(tmp_path: Path) -> None:
    checkpoint = save_random_doge(tmp_path / "checkpoint", task=CLASSES, pad_token_id=None, num_hidden_layers=1)
    layout = open_bundle(make_bundle(checkpoint, tmp_path / "bundle", task=CLASSES)).layout()
    assert layout.signature.inputs[0].shape == (1, "sequence_length")
    with pytest.raises(ValueError, match="batch sizes > 1"):
        random_doge(kind=DogeForSequenceClassification, pad_token_id=None)(torch.ones(2, 3, dtype=torch.long))


def test_a_text_comes_in_one_call(classifier: tuple[Path, Path]) -> None:
    runner = open_runner(open_bundle(classifier[1]))
    runner.reset(2)
    assert runner.run(np.array([[5, 6], [7, 8]]), [2, 1]).shape == (2, 1, 2)
    with pytest.raises(UsageError, match="has no cache"):
        runner.run(np.array([[5], [7]]))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no-language-model": (CLASSES, {}, "task=causal-lm: .* is a DogeForSequenceClassification; give --task sequence-"),
    "no-classes": ("causal-lm", {"task": CLASSES}, "is a DogeForCausalLM; give --task causal-lm or --task features"),
    "bare-model": ("features", {"task": CLASSES}, "is a DogeModel; give --task features"),
    "cache": (
        "features",
        {"task": "features", "kv_cache": ("growing",)},
        "kv_cache=.* no meaning for task=features",
    ),
    "logits": (CLASSES, {"task": CLASSES, "logits": "all"}, "logits='all': has no meaning for task=sequence-"),
}


@pytest.mark.parametrize(("saved", "options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(saved: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint = save_random_doge(tmp_path / "checkpoint", task=saved, num_hidden_layers=1)
    with pytest.raises(UsageError, match=words):
        make_bundle(checkpoint, tmp_path / "bundle", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_only_a_language_model_generates_text(classifier: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["generate", str(classifier[1]), "--prompt", "x"]) == 2
    error = capfd.readouterr().err
    assert "is a bundle for task=sequence-classification; text is generated by one for causal-lm only" in error
    assert error.count("\n") == 1


def test_inspect_and_verify_name_the_task(classifier: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint, bundle = classifier
    assert run_command(["inspect", str(bundle)]) == 0
    assert "sequence-classification" in capfd.readouterr().out
    assert run_command(["verify", str(bundle), "--reference", str(checkpoint)]) == 0
    assert "greedy" not in capfd.readouterr().out
