"""genai_config.json: what onnxruntime-genai must know to run the growing graph of a bundle.

Reference: https://onnxruntime.ai/docs/genai/reference/config.html; `src/config.h` of microsoft/onnxruntime-genai 0.18.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.signature import TOTAL, Signature, past_name, present_name
from doge_deploy.config.model import DogeFacts

GENAI_CONFIG = "genai_config.json"

_SEARCH = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
"""Settings that transformers and onnxruntime-genai share, with transformers' defaults."""


def follows_convention(signature: Signature) -> bool:
    """Whether a growing graph has the inputs and outputs that Hugging Face tools know, and no others.

    They feed ids, mask, positions and the past; they expect logits, and a present as long as past and call together.
    """
    caches = list(signature.past())
    inputs = {spec.name for spec in signature.inputs} - {past.name for past, _ in caches}
    outputs = {spec.name for spec in signature.outputs} - {present.name for _, present in caches}
    return (
        inputs == {"input_ids", "attention_mask", "position_ids"}
        and outputs == {"logits"}
        and all(present.shape[2] == TOTAL for _, present in caches)
    )


def genai_config(
    facts: DogeFacts, layout: Layout, *, max_length: int, generation_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The document.

    Args:
        facts: the checkpoint.
        layout: the growing graph; onnxruntime-genai has no inputs for a static one. It runs on ONNX Runtime, so the
            graph that was lowered for that is named where there is one.
        max_length: most tokens that a row may hold.
        generation_config: the checkpoint's generation_config.json, for how tokens are chosen and what ends a text.
    """
    generation = {key: value for key, value in (generation_config or {}).items() if value is not None}
    lowered = layout.lowered.get("ort")
    file = layout.file if lowered is None or lowered.file is None else lowered.file
    past = {kind: past_name("%d", kind) for kind in ("key", "value")}
    ids = {
        "bos_token_id": generation.get("bos_token_id", facts.bos_token_id),
        "eos_token_id": generation.get("eos_token_id", facts.eos_token_id),
        "pad_token_id": generation.get("pad_token_id", facts.pad_token_id),
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": file,
        "head_size": facts.head_dim,
        "hidden_size": facts.hidden_size,
        "num_attention_heads": facts.num_attention_heads,
        "num_hidden_layers": facts.num_hidden_layers,
        "num_key_value_heads": facts.num_key_value_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": past["key"],
            "past_value_names": past["value"],
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": present_name(past["key"]),
            "present_value_names": present_name(past["value"]),
        },
    }
    search = {name: generation.get(name, default) for name, default in _SEARCH.items()}
    if not search["do_sample"]:  # as in transformers, where these have no meaning without sampling
        search |= {name: _SEARCH[name] for name in ("temperature", "top_k", "top_p")}
    return {
        "model": {
            "type": "decoder",
            **{name: value for name, value in ids.items() if value is not None},
            "context_length": max_length,
            "vocab_size": facts.vocab_size,
            "decoder": decoder,
        },
        # not shared in the standard graph: its present tensors are concatenations, longer than the past
        "search": {
            **search,
            "max_length": max_length,
            "past_present_share_buffer": lowered is not None and lowered.shares_buffers,
        },
    }


def write_genai_config(path: Path, document: Mapping[str, Any]) -> None:
    """Write it, the same bytes for the same document."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
