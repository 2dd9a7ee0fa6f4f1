"""How large inputs of products become, against transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.tokenizer import encode
from doge_deploy.graph.ranges import input_ranges
from doge_deploy.text.calibration import CALIBRATION
from doge_deploy.verify.held_out import HELD_OUT
from doge_deploy.verify.reference import Reference


def ranges_of_transformers(name: str, ids: list[int]) -> dict[str, float]:
    """The same of one row, from hooks in transformers' own modules."""
    model = Reference(open_checkpoint(name), "float32").model
    found: dict[str, float] = {}

    def note(weight: str, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        found[weight] = float(inputs[0].abs().max())

    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(note, f"{module_name}.weight"))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return found


@pytest.mark.parametrize("name", ["doge-tiny", "doge-tiny-moe"])
def test_ranges_are_those_of_transformers(name: str) -> None:
    checkpoint = open_checkpoint(name)
    ids = encode(checkpoint, CALIBRATION)
    assert ids is not None
    found = input_ranges(checkpoint, ids[:60], routing="reference", max_length=64)
    expected = ranges_of_transformers(name, ids[:60])
    assert expected.keys() - {"lm_head.weight"} == found.keys() - {"model.embed_tokens.weight"}
    assert found["model.embed_tokens.weight"] == pytest.approx(expected["lm_head.weight"], rel=1e-4)
    for weight in expected.keys() - {"lm_head.weight"}:
        assert found[weight] == pytest.approx(expected[weight], rel=1e-4), weight


def test_all_of_a_text_counts() -> None:
    checkpoint = open_checkpoint("doge-tiny")
    ids = encode(checkpoint, CALIBRATION)
    assert ids is not None and len(ids) > 600
    whole, first = (input_ranges(checkpoint, part, routing="reference", max_length=512) for part in (ids, ids[:16]))
    assert all(whole[name] >= first[name] for name in whole) and whole != first


def test_the_text_is_not_what_quality_is_judged_by() -> None:
    lines = {line.strip() for line in HELD_OUT.split(". ") if len(line) > 20}
    assert not any(line in CALIBRATION for line in lines)
