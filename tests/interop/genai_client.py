"""Bundles in onnxruntime-genai, through the genai_config.json that export wrote, as docs/interop.md shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from client import Rows, compare


def run(bundle: Path, case: dict[str, Any]) -> Rows:
    model = genai.Model(str(bundle))
    prompts, count = case["prompts"], len(case["tokens"][0])
    width = max(map(len, prompts))
    ids = np.array([prompt + [2] * (width - len(prompt)) for prompt in prompts], np.int32)  # 2 is Doge's padding
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=width + count, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    if case["text"] is not None:
        check_tokenizer(model, case)
    return [[int(token) for token in generator.get_sequence(row)][width:] for row in range(len(prompts))]


def check_tokenizer(model: genai.Model, case: dict[str, Any]) -> None:
    """Its own tokenizer gives the prompt, apart from the begin-of-text token, and the text back."""
    tokenizer = genai.Tokenizer(model)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("What is a list?")]
    assert ids == case["prompts"][0], (ids, case["prompts"][0])
    text = tokenizer.decode(np.array(case["tokens"][0], np.int32))
    assert text.strip() == case["text"].strip(), (text, case["text"])


if __name__ == "__main__":
    compare(
        run,
        "onnxruntime-genai",
        only=lambda case: True,
        files=lambda case: [case["lowered"] or case["file"]],  # what genai_config.json names
    )
