"""The reference does not change: not by a call, not by another reference of the same checkpoint, not by an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_doge import save_random_doge

from doge_deploy.checkpoint import Checkpoint, open_checkpoint
from doge_deploy.verify import reference as reference_module
from doge_deploy.verify.reference import Reference, ReferenceRows, few_threads

IDS = np.arange(3, 27)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A mixture whose window is shorter than the text."""
    folder = tmp_path_factory.mktemp("reference") / "checkpoint"
    return open_checkpoint(str(save_random_doge(folder, is_moe=True, keep_window_size=8)))


def logits(reference: Reference, **options: Any) -> torch.Tensor:
    (row,), _ = ReferenceRows(reference, 1, "right").run(IDS, np.array([IDS.shape[1]]), **options)
    return row


def own_attributes(reference: Reference) -> list[list[str]]:
    """Functions of single modules that were replaced, and hooks."""
    return [
        sorted({"forward", "prepare_dynamic_mask"} & set(vars(module))) + list(map(str, module._forward_hooks))
        for module in reference.model.modules()
    ]


def test_a_call_leaves_the_model_as_it_was(checkpoint: Checkpoint) -> None:
    reference = Reference(checkpoint, "float32")
    before, attributes = own_attributes(reference), set(vars(reference))
    first = logits(reference)
    assert own_attributes(reference) == before and set(vars(reference)) == attributes
    assert torch.equal(logits(reference), first)


def test_an_error_in_a_call_leaves_the_model_as_it_was(checkpoint: Checkpoint) -> None:
    reference = Reference(checkpoint, "float32")
    before, expected = own_attributes(reference), logits(reference)
    wrong = {"kept.0": np.ones((1, 1, 2, 3), bool)}
    with pytest.raises((RuntimeError, IndexError)):
        logits(reference, given=wrong)
    assert own_attributes(reference) == before
    assert torch.equal(logits(reference), expected)


def test_what_one_call_saw_is_not_changed_by_the_next(checkpoint: Checkpoint) -> None:
    reference = Reference(checkpoint, "float32")
    count = np.array([IDS.shape[1]])
    _, first = ReferenceRows(reference, 1, "right").run(IDS, count)
    gap, scores = first.gap, {layer: score.clone() for layer, score in first.scores.items()}
    _, second = ReferenceRows(reference, 1, "right").run(IDS[:, ::-1], count)
    assert second is not first and first.gap == gap < float("inf")
    assert all(torch.equal(first.scores[layer], score) for layer, score in scores.items())


def test_other_weights_are_another_reference(checkpoint: Checkpoint) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = Reference(checkpoint, "float32")
    expected = logits(plain)
    other = Reference(checkpoint, "float32", weights={name: lambda weight: weight.half()})
    assert torch.equal(other.model.get_parameter(name), checkpoint.read(name).half().float())
    assert not torch.equal(logits(other), expected)
    assert torch.equal(plain.model.get_parameter(name), checkpoint.read(name))
    assert torch.equal(logits(plain), expected)


@pytest.mark.parametrize("small", [True, False])
def test_threads_are_given_back(checkpoint: Checkpoint, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr(reference_module, "SMALL_PARAMETERS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), few_threads(checkpoint):
            assert torch.get_num_threads() == (1 if small else 2)
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
        Reference(checkpoint, "float32")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_verify_gives_its_threads_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from bundles import make_bundle

    from doge_deploy.verify.run import verify

    bundle = make_bundle(checkpoint.path, tmp_path / "bundle")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert verify(bundle, reference=str(checkpoint.path), greedy_steps=2).passed
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
