"""Bundles in OpenVINO, as docs/interop.md shows it: those without local functions, which it does not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from client import Rows, compare


def run(bundle: Path, case: dict[str, Any]) -> Rows:
    # its own choice of a precision may be lower than the graph's
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.compile_model(bundle / case["file"], "CPU", options)
    prompts, count = case["prompts"], len(case["tokens"][0])
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    caches: dict[str, Any] = {
        value.any_name: np.zeros(
            [len(prompts), value.partial_shape[1].get_length(), 0, value.partial_shape[3].get_length()],
            value.element_type.to_dtype(),
        )
        for value in model.inputs
        if value.any_name.startswith("past_key_values.")
    }
    made: list[Any] = []
    for _ in range(count):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        output = model({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **caches})
        ids = output["logits"][:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        caches = {name: output[name.replace("past_key_values", "present")] for name in caches}
        made.append(ids)
    rows: Rows = np.concatenate(made, 1).tolist()
    return rows


if __name__ == "__main__":
    compare(run, "OpenVINO", only=lambda case: case["inlined"], bundle="inlined")
