"""Memory of a model: weights and caches to the byte, activations from above."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from doge_deploy.bundle.signature import make_signature
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.config.model import DogeFacts
from doge_deploy.doctor.fit import activation_bytes, decode_bytes, needs, row_cache_bytes, weight_bytes

DENSE, MOE = (open_checkpoint(name).facts for name in ("doge-tiny", "doge-tiny-moe"))


@pytest.mark.parametrize("facts", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize(("dtype", "item"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_weights_are_those_of_the_checkpoint(facts: DogeFacts, dtype: str, item: int) -> None:
    checkpoint = open_checkpoint("doge-tiny-moe" if facts.is_moe else "doge-tiny")
    stored = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    assert facts.tie_word_embeddings
    assert weight_bytes(facts, dtype) == item * (stored + facts.vocab_size * facts.hidden_size)
    assert weight_bytes(replace(facts, tie_word_embeddings=False), dtype) == weight_bytes(facts, dtype)


@pytest.mark.parametrize("facts", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_caches_are_those_of_the_static_layout(facts: DogeFacts, dtype: str, name: str) -> None:
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    signature = make_signature(facts, "static", dtype=name, max_length=96, last_logits=True)
    buffers = sum(
        sizes[past.dtype] * math.prod(1 if isinstance(axis, str) else axis for axis in past.shape)
        for past, _ in signature.past()
    )
    assert row_cache_bytes(facts, dtype, 96) == buffers


def test_needs_grow_with_rows_but_weights_do_not() -> None:
    one, four = (needs(DENSE, "fp16", batch_size=rows, max_length=512) for rows in (1, 4))
    assert four.weight_bytes == one.weight_bytes
    assert four.cache_bytes == 4 * one.cache_bytes
    assert four.total_bytes < 4 * one.total_bytes


def test_activations_hold_at_least_what_one_attention_holds() -> None:
    at_once = 4 * DENSE.num_attention_heads * 512 * 512
    assert activation_bytes(DENSE, "fp16", batch_size=1, tokens=512, keys=512, last=True) > at_once
    every = activation_bytes(DENSE, "fp16", batch_size=1, tokens=512, keys=512, last=False)
    last = activation_bytes(DENSE, "fp16", batch_size=1, tokens=512, keys=512, last=True)
    assert every - last == 511 * DENSE.vocab_size * 4


def test_a_decode_step_reads_only_its_experts() -> None:
    tables = 2 * MOE.num_hidden_layers * MOE.hidden_size * 4
    all_experts = decode_bytes(replace(MOE, num_experts_per_tok=MOE.num_experts), "fp32", batch_size=1, keys=1)
    few = decode_bytes(MOE, "fp32", batch_size=1, keys=1)
    assert all_experts - few == tables * (MOE.num_experts - MOE.num_experts_per_tok)


def test_an_untied_embedding_is_read_by_row() -> None:
    untied = replace(DENSE, tie_word_embeddings=False)
    difference = decode_bytes(untied, "fp32", batch_size=3, keys=1) - decode_bytes(DENSE, "fp32", batch_size=3, keys=1)
    assert difference == 3 * DENSE.hidden_size * 4
