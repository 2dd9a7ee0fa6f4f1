"""A random Llama of a Doge's shape, as a GGUF file.

The same number of layers, heads and numbers in every matrix, the same vocabulary, tied or not; what a Doge has beyond a
Llama (scores, norms of queries and keys, residual weights) is a thousandth of its weights. All matrices are stored in
one type, the embedding and the head too; norms are float32.
Reference: docs/gguf.md of ggml-org/ggml; src/llama-arch.cpp of ggml-org/llama.cpp for the names.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.config.model import DogeFacts

TYPES = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
"""How a bundle stores its weights, see `weights_of` -> the type of llama.cpp with as many bits."""

BLOCK = 32
"""Numbers of a block of Q8_0 and Q4_0; a row holds whole blocks."""


def shapes(facts: DogeFacts) -> dict[str, tuple[int, int]]:
    """The matrices of a Llama of that shape, `(outputs, inputs)`."""
    size, inner = facts.hidden_size, facts.intermediate_size
    queries, keys = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    layer = {
        "attn_q": (queries, size),
        "attn_k": (keys, size),
        "attn_v": (keys, size),
        "attn_output": (size, queries),
        "ffn_gate": (inner, size),
        "ffn_up": (inner, size),
        "ffn_down": (size, inner),
    }
    found = {"token_embd.weight": (facts.vocab_size, size)}
    if not facts.tie_word_embeddings:
        found["output.weight"] = (facts.vocab_size, size)
    for index in range(facts.num_hidden_layers):
        found |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    return found


def write_gguf(path: Path, facts: DogeFacts, kind: str, tokenizer: Path | None = None) -> None:
    """Write the file, aside first.

    Args:
        path: of the file; its folder is made.
        facts: the shape.
        kind: a value of `TYPES`.
        tokenizer: a tokenizer.json of byte-level BPE whose vocabulary goes into the file; none does where None.
    """
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(aside, "llama")
        _write_facts(writer, facts)
        if tokenizer is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            _write_vocabulary(writer, json.loads(tokenizer.read_text(encoding="utf-8"))["model"], facts.vocab_size)
        for name, tensor in _norms(facts).items():
            writer.add_tensor(name, tensor)
        numbers = np.random.default_rng(0)
        stored = getattr(gguf.GGMLQuantizationType, kind)
        for name, shape in shapes(facts).items():
            weight = numbers.standard_normal(shape, np.float32) * np.float32(0.02)
            writer.add_tensor(name, gguf.quants.quantize(weight, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


def _write_facts(writer: Any, facts: DogeFacts) -> None:
    writer.add_context_length(facts.max_position_embeddings)
    writer.add_embedding_length(facts.hidden_size)
    writer.add_block_count(facts.num_hidden_layers)
    writer.add_feed_forward_length(facts.intermediate_size)
    writer.add_head_count(facts.num_attention_heads)
    writer.add_head_count_kv(facts.num_key_value_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_rope_dimension_count(facts.head_dim)
    writer.add_rope_freq_base(float(facts.rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(facts.rms_norm_eps)
    writer.add_vocab_size(facts.vocab_size)


def _write_vocabulary(writer: Any, model: Mapping[str, Any], size: int) -> None:
    """Tokens and merges of a BPE model, filled up to `size` tokens."""
    tokens = [f"<unused {token}>" for token in range(size)]
    for text, token in model["vocab"].items():
        tokens[token] = text
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * size)  # normal ones
    writer.add_token_merges(merges)


def _norms(facts: DogeFacts) -> dict[str, Any]:
    names = [f"blk.{index}.{kind}_norm.weight" for index in range(facts.num_hidden_layers) for kind in ("attn", "ffn")]
    return {name: np.ones(facts.hidden_size, np.float32) for name in (*names, "output_norm.weight")}
