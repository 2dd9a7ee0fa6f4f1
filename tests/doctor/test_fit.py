"""Memory of a model: weights and caches to the byte, activations from above."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_bundle

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.signature import BATCH, CACHE_ROWS, bounded, make_signature
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.names import EMBEDDING
from doge_deploy.config.model import DogeFacts
from doge_deploy.config.revisions import REVISIONS
from doge_deploy.doctor.fit import activation_bytes, angle_bytes, needs, row_cache_bytes, weight_bytes
from doge_deploy.graph.weight_file import read_weight_file
from doge_deploy.graph.weight_formats import format_of

DENSE, MOE = (open_checkpoint(name).facts for name in ("doge-tiny", "doge-tiny-moe"))
DYNAMIC = replace(DENSE, rope={**DENSE.rope, "rope_type": "dynamic"}, original_max_position_embeddings=100)


@pytest.mark.parametrize("facts", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize(("dtype", "item"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_weights_are_those_of_the_checkpoint(facts: DogeFacts, dtype: str, item: int) -> None:
    checkpoint = open_checkpoint("doge-tiny-moe" if facts.is_moe else "doge-tiny")
    stored = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    assert facts.tie_word_embeddings
    scores = sum(math.prod(t.shape) for name, t in checkpoint.tensors.items() if ".A" in name or ".dt_proj." in name)
    expected = item * (stored - scores + facts.vocab_size * facts.hidden_size) + 4 * scores
    assert weight_bytes(facts, dtype) == expected, "scores are computed in fp32"
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


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_caches_of_an_engine_are_those_of_the_bounded_signature(dtype: str, name: str) -> None:
    """The rank has a position beside the score."""
    static = make_signature(DENSE, "static", dtype=name, max_length=512, last_logits=True)
    sizes = {"float32": 4, "bfloat16": 2, BATCH: 1, CACHE_ROWS: DENSE.num_key_value_heads}
    buffers = sum(
        sizes[past.dtype] * math.prod(axis if isinstance(axis, int) else sizes[axis] for axis in past.shape)
        for past, _ in bounded(static, 64, decode=True).past()
    )
    assert row_cache_bytes(DENSE, dtype, 64, score_numbers=2) == buffers


@pytest.mark.parametrize("facts", [DENSE, DYNAMIC], ids=["always-the-same", "dynamic"])
def test_angles_are_those_of_the_weight_file(facts: DogeFacts) -> None:
    item = {"rope_cos": 2, "rope_sin": 2, "rope_frequencies": 4, "rope_scaling": 4}
    expected = sum(item[name] * math.prod(shape) for name, shape in facts.rope_shapes(300).items())
    assert angle_bytes(facts, "fp16", 300) == expected > 0


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


@pytest.mark.parametrize("options", [{"quantize": "int4"}, {"quantize": "int8"}, {"quantize": "fp16"}], ids=str)
def test_weights_of_a_format_are_those_of_the_weight_file(options: dict[str, str], tmp_path: Path) -> None:
    """The file, and the tied embedding once more; fp16 is widened where it is multiplied with."""
    bundle = open_bundle(make_bundle("doge-tiny-moe", tmp_path / "b", max_length=32, **options))
    stored_as = format_of(bundle.manifest.options)
    assert stored_as is not None
    file = read_weight_file(bundle.path)
    parts = {name: stored_as.part_of(name, info.dtype) for name, info in file.items()}
    total = 0
    for name, info in file.items():
        part = parts[name]
        if "rope" in name or (part is not None and not part.tensor):
            continue
        table = part is not None and "_embed" in part.tensor and ".layers." in part.tensor
        wide = options["quantize"] == "fp16" and part is not None and not table
        total += info.nbytes * (2 if wide else 1)
        if part is not None and part.tensor == EMBEDDING:
            total += info.nbytes
    assert weight_bytes(bundle.manifest.facts, "fp32", stored_as) == total
    assert total < weight_bytes(bundle.manifest.facts, "fp32")


def test_a_legacy_doge_caches_a_score_per_query_head() -> None:
    revision = next(name for name, found in REVISIONS.items() if found.score_per_query_head)
    more = DENSE.num_attention_heads - DENSE.num_key_value_heads
    legacy = row_cache_bytes(replace(DENSE, revision=revision), "fp16", 10)
    assert legacy - row_cache_bytes(DENSE, "fp16", 10) == DENSE.num_hidden_layers * more * 10 * 4
