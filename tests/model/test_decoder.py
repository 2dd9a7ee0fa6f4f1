"""The traced PyTorch model, run eagerly, against transformers: no ONNX in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_doge import SMALL, SMALL_MOE, random_doge
from transformers import DogeForCausalLM

from doge_deploy.config import DogeFacts
from doge_deploy.model.decoder import CausalLM, GrowingCausalLM, StaticCausalLM
from doge_deploy.model.rope import rope_tables

LENGTH = 24  # three times the window of SMALL

CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": SMALL_MOE,
    "moe-norm-topk": {**SMALL_MOE, "norm_topk_prob": True},
    "one-group": {"num_key_value_heads": 4},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "wide-head": {"head_dim": 24},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "gelu": {"hidden_act": "gelu"},
}


def ours(reference: DogeForCausalLM, kind: type[CausalLM], **options: Any) -> CausalLM:
    """Our model with the weights of transformers' one."""
    config = reference.config.to_dict()
    facts = DogeFacts.from_config({**config, "architectures": None})
    arguments = {
        "max_length": facts.max_position_embeddings,
        "keep_window_size": facts.keep_window_size,
        "routing": "reference",
        "last_logits": False,
        "dtype": torch.float32,
    }
    model = kind(facts, **{**arguments, **options}).eval()
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert set(missing) == {"rope_cos", "rope_sin"}
    assert set(unexpected) <= {"lm_head.weight"}  # tied
    model.rope_cos.data, model.rope_sin.data = rope_tables(config, facts.max_position_embeddings)
    return model


def empty_past(model: CausalLM, slots: int) -> list[tuple[torch.Tensor, ...]]:
    facts = model.facts
    widths = (facts.head_dim, facts.head_dim, 1) if isinstance(model, StaticCausalLM) else (facts.head_dim,) * 2
    shape = (1, facts.num_key_value_heads, slots)
    return [tuple(torch.zeros(*shape, width) for width in widths) for _ in range(facts.num_hidden_layers)]


def distinct_ids(seed: int = 0) -> torch.Tensor:
    return torch.randperm(SMALL["vocab_size"], generator=torch.Generator().manual_seed(seed))[None, :LENGTH]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("kind", [GrowingCausalLM, StaticCausalLM], ids=["growing", "static"])
@torch.no_grad()
def test_prefill_and_decode_equal_transformers(kind: type[CausalLM], config: dict[str, Any]) -> None:
    reference = random_doge(**config)
    model, ids = ours(reference, kind), distinct_ids()
    split = LENGTH - 3
    past = empty_past(model, 64 if kind is StaticCausalLM else 0)
    cache = None
    for start, stop in ((0, split), (split, split + 1), (split + 1, LENGTH)):
        expected = reference(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = expected.past_key_values
        if kind is StaticCausalLM:
            logits, past = model(ids[:, start:stop], torch.tensor([start]), past)
        else:
            positions = torch.arange(start, stop)[None]
            logits, past = model(ids[:, start:stop], torch.ones(1, stop, dtype=torch.long), positions, past)
        torch.testing.assert_close(logits, expected.logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_last_logits_are_those_of_each_rows_last_real_token() -> None:
    reference = random_doge()
    ids = torch.cat((distinct_ids(1), distinct_ids(2)))
    whole, last = ours(reference, StaticCausalLM), ours(reference, StaticCausalLM, last_logits=True)
    start, lengths = torch.zeros(2, dtype=torch.long), torch.tensor([LENGTH, 9])
    past = [tuple(t.expand(2, -1, -1, -1) for t in layer) for layer in empty_past(whole, 64)]
    every, _ = whole(ids, start, past)
    some, _ = last(ids, start, past, sequence_lengths=lengths)
    torch.testing.assert_close(some[:, 0], every[[0, 1], lengths - 1])
