"""The position tables against transformers' own module, and against a slow and exact evaluation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DogeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.doge.modeling_doge import DogeRotaryEmbedding

from doge_deploy.config.model import DogeFacts
from doge_deploy.model.rope import _first_frequencies, default_frequencies, rope_tensors

LENGTH = 512
HALF = 16

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + i / HALF for i in range(HALF)],
        "long_factor": [2.0] * HALF,
        "original_max_position_embeddings": LENGTH,
        "factor": 4.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def config(rope: dict[str, Any]) -> dict[str, Any]:
    values = {"hidden_size": 4 * 2 * HALF, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
    return DogeConfig(**values, rope_parameters=dict(rope)).to_dict()


def tensors(rope: dict[str, Any], length: int) -> dict[str, torch.Tensor]:
    facts = DogeFacts.from_config({**config(rope), "architectures": None})
    return rope_tensors(config(rope), facts, length)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_tables_are_within_an_ulp_of_transformers(rope: dict[str, Any]) -> None:
    cos, sin = tensors(rope, LENGTH).values()
    module = DogeRotaryEmbedding(DogeConfig.from_dict(config(rope)))
    expected = module(torch.empty(0), torch.arange(LENGTH)[None])
    for table, both_halves in zip((cos, sin), expected, strict=True):
        assert table.shape == (LENGTH, HALF)
        ulp = torch.finfo(torch.float32).eps * float(table.abs().max())
        assert float((table - both_halves[0, :, :HALF]).abs().max()) <= ulp


@pytest.mark.parametrize("theta", [10000, 1e4, 500000.0, 1.5, 123456.789])
@pytest.mark.parametrize("head_dim", [8, 26, 64, 128])
def test_default_frequencies_are_those_of_transformers_to_the_bit(head_dim: int, theta: float) -> None:
    values = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": 16}
    config = DogeConfig(**values, rope_parameters={"rope_type": "default", "rope_theta": theta})
    facts = DogeFacts.from_config({**config.to_dict(), "architectures": None})
    assert default_frequencies(facts).tobytes() == DogeRotaryEmbedding(config).inv_freq.numpy().tobytes()


@pytest.mark.parametrize("length", [3000, 2048, 777])
@pytest.mark.parametrize("factor", [1, 4.0, 4.1, 1.1, 1e6 / 3])
@pytest.mark.parametrize(("head_dim", "theta"), [(4, 10000), (64, 1e4), (128, 123456.789), (26, 1.5)])
def test_first_dynamic_frequencies_are_those_of_transformers_to_the_bit(
    head_dim: int, theta: float, factor: float, length: int
) -> None:
    values = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": length}
    rope = {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}
    config = DogeConfig(**values, rope_parameters=rope)
    facts = DogeFacts.from_config({**config.to_dict(), "architectures": None})
    found, scaling = _first_frequencies(config.to_dict(), facts)
    reference, expected_scaling = ROPE_INIT_FUNCTIONS["dynamic"](config)
    assert (found.tobytes(), scaling) == (reference.numpy().tobytes(), expected_scaling)


def test_tables_are_correctly_rounded_cosines_of_float32_angles() -> None:
    rope = ROPES["dynamic"]
    cos, _ = tensors(rope, LENGTH).values()
    frequencies = DogeRotaryEmbedding(DogeConfig.from_dict(config(rope))).inv_freq.numpy()
    for position in (0, 1, 255, 256, LENGTH - 1):
        angles = [np.float32(position) * frequency for frequency in frequencies]
        assert cos[position].tolist() == [float(np.float32(math.cos(angle))) for angle in angles]


@pytest.mark.parametrize(("name", "rows"), [("dynamic", 41), ("longrope", 2)])
def test_frequencies_beyond_the_original_length_are_those_of_transformers(name: str, rows: int) -> None:
    found = tensors(ROPES[name], LENGTH + 40)
    module = DogeRotaryEmbedding(DogeConfig.from_dict(config(ROPES[name])))
    assert found["rope_frequencies"].shape == (rows, HALF)
    assert found["rope_scaling"].tolist() == [np.float32(module.attention_scaling)]
    for length in (LENGTH, LENGTH + 1, LENGTH + 40):
        module(torch.empty(0), torch.tensor([[length - 1]]))
        row = length - LENGTH if name == "dynamic" else int(length > LENGTH)
        assert torch.equal(found["rope_frequencies"][row], module.inv_freq)


@pytest.mark.parametrize("name", ["default", "linear", "yarn", "llama3"])
def test_other_types_have_tables_of_any_length(name: str) -> None:
    assert tensors(ROPES[name], 2 * LENGTH)["rope_cos"].shape == (2 * LENGTH, HALF)


WITHOUT_TRANSFORMERS = """
import json, sys
sys.modules["transformers"] = None  # importing it, which takes a second, is an error
from doge_deploy.config.model import DogeFacts
from doge_deploy.model.rope import rope_tensors
config = json.loads(sys.argv[1])
print(list(rope_tensors(config, DogeFacts.from_config(config), 16)))
"""


@pytest.mark.parametrize("name", ["default", "dynamic"])
def test_published_types_do_not_wait_for_transformers(name: str) -> None:
    text = json.dumps({**config(ROPES[name]), "architectures": None})
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS, text], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "['rope_cos', 'rope_sin']\n"), done.stderr
