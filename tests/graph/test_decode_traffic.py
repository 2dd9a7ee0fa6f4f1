"""Bytes of a decode step, against the tensors that transformers reads in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import make_bundle, shared_bundle
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from doge_deploy.bench.baselines.eager import load_model
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.config.model import DogeFacts
from doge_deploy.config.revisions import REVISIONS
from doge_deploy.graph.decode_traffic import EXPERT_TABLES, bundle_traffic, decode_traffic, row_traffic
from doge_deploy.graph.weight_file import read_weight_file
from doge_deploy.graph.weight_formats import format_of


class ReadBytes(TorchDispatchMode):
    """Counts how much of each parameter the operators of a call read: all of it, or the rows that are looked up."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in parameters.items()}
        self.read: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.embedding.default:
            self._note(args[0], result.nbytes)
        elif not func.is_view:
            for tensor in args:
                if isinstance(tensor, torch.Tensor):
                    self._note(tensor, tensor.nbytes)
        return result

    def _note(self, tensor: torch.Tensor, nbytes: int) -> None:
        name = self.names.get(tensor.untyped_storage().data_ptr())
        if name is not None:
            self.read[name] = max(self.read.get(name, 0), nbytes)


def decode_in_transformers(model: str | Path, keys: int, batch: int) -> tuple[dict[str, int], int]:
    """Bytes read of every parameter, and bytes of the cached keys and values, by a step that attends to `keys`."""
    doge = load_model(open_checkpoint(str(model)).path, dtype="float32", num_layers=None)
    cache = DynamicCache()
    with torch.no_grad():
        doge(input_ids=torch.arange(3, keys + 2).repeat(batch, 1), past_key_values=cache, use_cache=True)
        with ReadBytes(dict(doge.named_parameters())) as counted:
            doge(input_ids=torch.full((batch, 1), 5), past_key_values=cache, use_cache=True)
    caches: Any = cache.layers
    return counted.read, sum(layer.keys.nbytes + layer.values.nbytes for layer in caches)


def rope_rows(bundle: Bundle) -> int:
    """transformers computes angles; a bundle reads a row of each table."""
    return sum(info.nbytes // info.shape[0] for name, info in read_weight_file(bundle.path).items() if "rope" in name)


@pytest.mark.parametrize("name", ["doge-tiny", "doge-tiny-moe"])
@pytest.mark.parametrize("layout", ["static", "growing"])
def test_weights_and_caches_are_those_that_transformers_reads(
    name: str, layout: str, request: pytest.FixtureRequest
) -> None:
    bundle = open_bundle(request.getfixturevalue("tiny_moe_bundle" if "moe" in name else "tiny_bundle"))
    facts, keys = bundle.manifest.facts, 10
    parameters, caches = decode_in_transformers(name, keys, batch=1)
    traffic = bundle_traffic(bundle, bundle.layout(layout), batch_size=1, keys=keys)
    assert traffic.weight_bytes - rope_rows(bundle) == sum(parameters.values())
    assert keys <= facts.keep_window_size
    scores = facts.num_hidden_layers * facts.num_key_value_heads * keys * 4
    assert traffic.cache_bytes == caches + (scores if layout == "static" else 0)


def test_only_the_routed_experts_are_read(tiny_moe_bundle: Path) -> None:
    bundle = open_bundle(tiny_moe_bundle)
    facts = bundle.manifest.facts
    parameters, _ = decode_in_transformers("doge-tiny-moe", 10, batch=1)
    experts = {name: read for name, read in parameters.items() if "_embed." in name and "layers" in name}
    assert len(experts) == 2 * facts.num_hidden_layers
    assert set(experts.values()) == {facts.num_experts_per_tok * facts.hidden_size * 4}
    assert facts.num_experts_per_tok < facts.num_experts


@pytest.mark.parametrize("name", ["doge-tiny", "doge-tiny-moe"])
def test_half_weights_are_read_in_float32_but_for_experts(name: str, request: pytest.FixtureRequest) -> None:
    plain = open_bundle(request.getfixturevalue("tiny_moe_bundle" if "moe" in name else "tiny_bundle"))
    half = open_bundle(shared_bundle(name, quantize="fp16", max_length=64))
    facts = plain.manifest.facts
    one, two = (bundle_traffic(b, b.layout("static"), batch_size=1, keys=10).weight_bytes for b in (plain, half))
    rows = 2 * facts.num_hidden_layers * facts.num_experts_per_tok if facts.is_moe else 0
    assert one - two == rows * facts.hidden_size * 2


def test_rows_of_a_batch_share_the_weights_and_not_the_caches(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    one, three = (bundle_traffic(bundle, bundle.layout("static"), batch_size=b, keys=10) for b in (1, 3))
    parameters, caches = decode_in_transformers("doge-tiny", 10, batch=3)
    assert three.weight_bytes == one.weight_bytes == sum(parameters.values()) + rope_rows(bundle)
    assert three.cache_bytes == 3 * one.cache_bytes
    growing = bundle_traffic(bundle, bundle.layout("growing"), batch_size=3, keys=10)
    assert growing.cache_bytes == caches


def test_above_the_window_only_kept_keys_are_read(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    facts, window = bundle.manifest.facts, bundle.manifest.facts.keep_window_size
    assert window < bundle.manifest.max_length, "doge-tiny drops keys"
    at, above = (
        bundle_traffic(bundle, bundle.layout("static"), batch_size=1, keys=keys).cache_bytes
        for keys in (window, window + 7)
    )
    assert above == at, "a key that is dropped never comes back: not even its score is read"
    at, above = (
        bundle_traffic(bundle, bundle.layout("growing"), batch_size=1, keys=keys).cache_bytes
        for keys in (window, window + 7)
    )
    heads = facts.num_hidden_layers * facts.num_key_value_heads
    assert above - at == heads * 7 * facts.head_dim * 4, "seven more values, to compute their scores from"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_count_as_they_are_stored(bits: int, tmp_path: Path) -> None:
    options = {"quantize": f"int{bits}", "block_size": 32, "num_layers": 1}
    bundle = open_bundle(make_bundle("doge-tiny-moe", tmp_path / "bundle", **options))
    facts = bundle.manifest.facts
    hidden, heads, kv_heads = facts.hidden_size, facts.num_attention_heads, facts.num_key_value_heads
    width, kv_width = heads * facts.head_dim, kv_heads * facts.head_dim
    linears = hidden * (2 * width + 2 * kv_width + 3 * facts.intermediate_size + facts.vocab_size)
    experts = 2 * facts.num_experts_per_tok * hidden
    kept = 2 * facts.num_keys * hidden + kv_width * kv_heads + kv_heads  # router, dt_proj, A
    vectors = 5 * hidden + 2 * facts.head_dim  # three norms, two residual scales; norms of queries and keys
    numbers = linears + experts
    expected = numbers * bits // 8 + numbers // 32 * 4 + (kept + vectors) * 4 + rope_rows(bundle)
    assert bundle_traffic(bundle, bundle.layout(), batch_size=1, keys=10).weight_bytes == expected


DENSE, MOE = (open_checkpoint(name).facts for name in ("doge-tiny", "doge-tiny-moe"))

STORED: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "int8": {"quantize": "int8"},
    "int4-asymmetric": {"quantize": "int4", "symmetric": False, "block_size": 16},
}


@pytest.mark.parametrize("options", STORED.values(), ids=STORED.keys())
def test_weights_are_those_of_the_weight_file(options: dict[str, Any], tmp_path: Path) -> None:
    """Computed from facts alone, and summed over what the file holds."""
    bundle = open_bundle(make_bundle("doge-tiny-moe", tmp_path / "b", max_length=32, **options))
    facts, stored_as, total = bundle.manifest.facts, format_of(bundle.manifest.options), 0
    for name, info in read_weight_file(bundle.path).items():
        part = stored_as.part_of(name, info.dtype) if stored_as else None
        if part is not None and not part.tensor:
            continue  # a constant
        tensor, rows = part.tensor if part else name, info.shape[0]
        if "rope" in name:
            total += info.nbytes // rows
        elif tensor.endswith(EXPERT_TABLES):
            total += info.nbytes // rows * facts.num_experts_per_tok
        else:
            total += info.nbytes
    assert bundle_traffic(bundle, bundle.layout(), batch_size=1, keys=8).weight_bytes == total


def weights_read(facts: DogeFacts, batch_size: int = 1) -> int:
    return decode_traffic(
        facts,
        dtype="float32",
        weight_format=None,
        layout="static",
        max_length=64,
        batch_size=batch_size,
        keys=1,
    ).weight_bytes


def test_rows_of_a_batch_may_choose_the_same_experts_and_tokens() -> None:
    """A floor must hold for the batch that reads least."""
    untied = replace(MOE, tie_word_embeddings=False)
    assert weights_read(untied, 1) == weights_read(untied, 8)
    tables = 2 * MOE.num_hidden_layers * MOE.hidden_size * 4
    every = weights_read(replace(MOE, num_experts_per_tok=MOE.num_experts))
    assert every - weights_read(MOE) == tables * (MOE.num_experts - MOE.num_experts_per_tok)


def test_the_shared_experts_are_read_by_every_step() -> None:
    wider = replace(MOE, intermediate_size=MOE.intermediate_size + 8)
    assert weights_read(wider) - weights_read(MOE) == MOE.num_hidden_layers * 3 * 8 * MOE.hidden_size * 4


def test_an_embedding_of_its_own_is_read_by_row() -> None:
    untied = replace(DENSE, tie_word_embeddings=False)
    assert weights_read(untied) - weights_read(DENSE) == DENSE.hidden_size * 4


def row(facts: DogeFacts, keys: int, *, max_length: int = 4096, layout: str = "static") -> int:
    return row_traffic(facts, dtype="fp16", layout=layout, max_length=max_length, keys=keys)


def test_a_legacy_doge_has_a_score_per_query_head() -> None:
    revision = next(name for name, found in REVISIONS.items() if found.score_per_query_head)
    legacy = replace(DENSE, revision=revision)
    more = DENSE.num_attention_heads - DENSE.num_key_value_heads
    assert more > 0
    assert row(legacy, 8) - row(DENSE, 8) == DENSE.num_hidden_layers * more * 8 * 4
    assert row(legacy, 8, layout="growing") == row(DENSE, 8, layout="growing")


def test_keys_beyond_the_window_are_not_read() -> None:
    window = DENSE.keep_window_size
    assert row(DENSE, 10 * window) == row(DENSE, window)
    assert row(DENSE, window - 1, max_length=window) < row(DENSE, window, max_length=window)


def test_keys_beyond_a_sliding_window_are_not_read() -> None:
    window = DENSE.keep_window_size
    sliding = replace(DENSE, sliding_window=window // 2)
    assert row(sliding, 10 * window) == row(DENSE, window // 2)
    scores = DENSE.num_hidden_layers * DENSE.num_key_value_heads * 4
    both = replace(DENSE, sliding_window=3 * window)
    assert row(both, 10 * window) - row(DENSE, window) == scores * 2 * window, "a better key may leave"
