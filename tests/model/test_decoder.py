"""The traced PyTorch model, run eagerly, against transformers: no ONNX in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_doge import DYNAMIC, LONGROPE, SMALL, SMALL_MOE, random_doge
from transformers import DogeForCausalLM

from doge_deploy.config.model import DogeFacts
from doge_deploy.model.decoder import Doge, GrowingCausalLM, StaticCausalLM, Windows
from doge_deploy.model.rope import rope_tensors

LENGTH = 24  # three times the window of SMALL
CAPACITY = 64

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
    "prelu": {"hidden_act": "prelu"},
    "prelu-moe": {**SMALL_MOE, "hidden_act": "prelu"},
    "xielu": {"hidden_act": "xielu"},
    "xielu-moe": {**SMALL_MOE, "hidden_act": "xielu"},
    "sliding": {"sliding_window": 7},
    "sliding-above-the-window": {"sliding_window": 12},
    "dynamic-beyond": {"max_position_embeddings": 16, "rope_parameters": {**DYNAMIC}},
    "longrope-beyond": {"rope_parameters": {**LONGROPE}},
}


def ours(reference: DogeForCausalLM, kind: type[Doge], **options: Any) -> Doge:
    """Our model with the weights of transformers' one."""
    config = reference.config.to_dict()
    facts = DogeFacts.from_config({**config, "architectures": None})
    arguments = {
        "max_length": CAPACITY,
        "windows": Windows(facts.keep_window_size, facts.sliding_window or 0),
        "routing": "reference",
        "last_logits": False,
        "dtype": torch.float32,
    }
    model = kind(facts, **{**arguments, **options}).eval()
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    rope = rope_tensors(config, facts, CAPACITY)
    assert set(missing) == set(rope)
    assert set(unexpected) <= {"lm_head.weight"}  # tied
    model.load_state_dict(rope, strict=False)
    return model


def empty_past(model: Doge, slots: int) -> list[tuple[torch.Tensor, ...]]:
    facts = model.facts
    widths = (facts.head_dim, facts.head_dim, 1) if isinstance(model, StaticCausalLM) else (facts.head_dim,) * 2
    shape = (1, facts.num_key_value_heads, slots)
    return [tuple(torch.zeros(*shape, width) for width in widths) for _ in range(facts.num_hidden_layers)]


def distinct_ids(seed: int = 0) -> torch.Tensor:
    return torch.randperm(SMALL["vocab_size"], generator=torch.Generator().manual_seed(seed))[None, :LENGTH]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("kind", [GrowingCausalLM, StaticCausalLM], ids=["growing", "static"])
@torch.no_grad()
def test_prefill_and_decode_equal_transformers(kind: type[Doge], config: dict[str, Any]) -> None:
    reference = random_doge(**config)
    model, ids = ours(reference, kind), distinct_ids()
    split = LENGTH - 3
    past = empty_past(model, CAPACITY if kind is StaticCausalLM else 0)
    cache = None
    memory: dict[str, torch.Tensor] = {"past_rope_length": torch.zeros(1, dtype=torch.long)}
    if not model.rope_remembers:
        memory = {}
    for start, stop in ((0, split), (split, split + 1), (split + 1, LENGTH)):
        expected = reference(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = expected.past_key_values
        if kind is StaticCausalLM:
            outputs = model(ids[:, start:stop], torch.tensor([start]), past, **memory)
        else:
            positions = torch.arange(start, stop)[None]
            outputs = model(ids[:, start:stop], torch.ones(1, stop, dtype=torch.long), positions, past, **memory)
        logits, past, *length = outputs
        if memory:
            memory["past_rope_length"] = length[0]
            assert length[0].tolist() == [max(stop, 16)]
        torch.testing.assert_close(logits, expected.logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_short_call_makes_dynamic_rope_forget() -> None:
    """transformers returns to the original angles in a call shorter than the original length, and only then."""
    model = ours(random_doge(**CONFIGS["dynamic-beyond"]), StaticCausalLM)
    positions = torch.arange(20)[None]
    seen = {
        (past, reach): int(model.rotation(positions[:, :reach], torch.tensor([past]))[2][0])
        for past in (0, 16, 19)
        for reach in (3, 15, 16, 17, 20)
    }
    assert {key: value for key, value in seen.items() if value != 16} == {
        **{(past, 17): 17 for past in (0, 16)},
        **{(past, 20): 20 for past in (0, 16, 19)},
        (19, 16): 19,  # as long as the original length: not shorter
        (19, 17): 19,
    }
    reference = random_doge(**CONFIGS["dynamic-beyond"]).model.rotary_emb
    for (past, reach), length in seen.items():
        reference.max_seq_len_cached, reference.inv_freq = 16, reference.original_inv_freq.clone()
        if past:
            reference(torch.empty(0), positions[:, :past])
        reference(torch.empty(0), positions[:, :reach])
        assert torch.equal(reference.inv_freq, model.rope_frequencies[length - 16]), (past, reach)


@torch.no_grad()
def test_last_logits_are_those_of_each_rows_last_real_token() -> None:
    reference = random_doge()
    ids = torch.cat((distinct_ids(1), distinct_ids(2)))
    whole, last = ours(reference, StaticCausalLM), ours(reference, StaticCausalLM, last_logits=True)
    start, lengths = torch.zeros(2, dtype=torch.long), torch.tensor([LENGTH, 9])
    past = [tuple(t.expand(2, -1, -1, -1) for t in layer) for layer in empty_past(whole, CAPACITY)]
    every, _ = whole(ids, start, past)
    some, _ = last(ids, start, past, sequence_lengths=lengths)
    torch.testing.assert_close(some[:, 0], every[[0, 1], lengths - 1])


@pytest.mark.parametrize("config", ["dense", "untied", "moe"])
@pytest.mark.parametrize("kind", [GrowingCausalLM, StaticCausalLM], ids=["growing", "static"])
@torch.no_grad()
def test_the_last_layer_works_for_the_head_only(kind: type[Doge], config: str) -> None:
    """Behind its attention a dense network computes one token a row; a mixture all, which reference routing mixes."""
    reference, ids = random_doge(**CONFIGS[config]), distinct_ids()
    every, last = ours(reference, kind), ours(reference, kind, last_logits=True)
    widths: list[int] = []
    for layer in last.layers():
        layer.mlp.register_forward_pre_hook(lambda _, arguments: widths.append(arguments[0].shape[1]))
    past = empty_past(every, CAPACITY if kind is StaticCausalLM else 0)
    real = LENGTH - 5 if kind is StaticCausalLM else LENGTH  # only the static layout pads on the right
    if kind is StaticCausalLM:
        start = torch.zeros(1, dtype=torch.int64)
        expected = every(ids[:, :real], start, past)[0]
        got = last(ids if config != "moe" else ids[:, :real], start, past, torch.tensor([real]))[0]
    else:
        masks = torch.ones_like(ids), torch.arange(LENGTH)[None]
        expected, got = every(ids, *masks, past)[0], last(ids, *masks, past)[0]
    assert got.shape[1] == 1
    torch.testing.assert_close(got, expected[:, -1:], rtol=0, atol=2e-6)
    assert widths[:-1] == [widths[0]] * (len(widths) - 1)
    assert widths[0] > 1
    assert widths[-1] == (widths[0] if config == "moe" else 1)
