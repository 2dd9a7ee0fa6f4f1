"""Bundles in `optimum.onnxruntime.ORTModelForCausalLM`, as docs/interop.md shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from client import Rows, compare
from optimum.onnxruntime import ORTModelForCausalLM


def run(bundle: Path, case: dict[str, Any]) -> Rows:
    model = ORTModelForCausalLM.from_pretrained(bundle, file_name=case["file"])
    model.num_key_value_heads = model.config.num_key_value_heads
    width = max(map(len, case["prompts"]))
    pad = model.config.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in case["prompts"]])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in case["prompts"]])
    count = len(case["tokens"][0])
    # not in a GenerationConfig: settings that equal its defaults give way to the bundle's generation_config.json
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=pad)
    return output[:, width:].tolist()


if __name__ == "__main__":
    compare(
        run,
        "optimum",
        only=lambda case: True,
        files=lambda case: [
            *([case["lowered"]] if case["lowered"] else []),
            *([] if case["quantized"] else [case["file"]]),
        ],
    )
