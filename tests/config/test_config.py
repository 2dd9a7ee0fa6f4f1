"""DogeFacts: the same reading as transformers, and a refusal by name of everything else."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from random_doge import SMALL, SMALL_MOE
from transformers import DogeConfig, GenerationConfig
from transformers.activations import ACT2CLS, ACT2FN

from doge_deploy.config import keys as config_keys
from doge_deploy.config.model import DogeFacts
from doge_deploy.diagnostics import join_findings, misspelt, suggest
from doge_deploy.errors import UnsupportedModelError

DOGE = {"model_type": "doge"}


OURS = {"rope", "head_dim", "original_max_position_embeddings", "revision", "architecture", "num_labels"}
"""Facts that a DogeConfig spells otherwise or does not have."""


def refusal(config: dict[str, Any]) -> str:
    """The message with which a config is refused, which must be one line."""
    with pytest.raises(UnsupportedModelError) as caught:
        DogeFacts.from_config(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    facts, reference = DogeFacts.from_config(DOGE), DogeConfig()
    for name, value in facts.to_json().items():
        if name not in OURS:
            assert value == getattr(reference, name), name
    assert facts.rope == reference.rope_parameters
    assert facts.head_dim == reference.hidden_size // reference.num_attention_heads


def test_every_key_that_transformers_writes_is_known() -> None:
    written = set(DogeConfig().to_dict()) | set(GenerationConfig._get_default_generation_params())
    assert written <= config_keys.KNOWN_KEYS


def test_activation_table_is_that_of_transformers() -> None:
    assert set(ACT2CLS) == config_keys.ACTIVATIONS


def test_activations_with_weights_are_those_that_transformers_saves_something_of() -> None:
    saved = {
        name: {weight: tuple(tensor.shape) for weight, tensor in ACT2FN[name].state_dict().items()} for name in ACT2CLS
    }
    assert {name: shapes for name, shapes in saved.items() if shapes} == config_keys.TRAINED_ACTIVATIONS


@pytest.mark.parametrize("config", [SMALL, SMALL_MOE], ids=["dense", "moe"])
def test_facts_of_a_saved_config(config: dict[str, Any], tmp_path: Path) -> None:
    DogeConfig(**config).save_pretrained(tmp_path)
    facts = DogeFacts.from_config(json.loads((tmp_path / "config.json").read_text()))
    assert {name: getattr(facts, name) for name in config} == config
    assert (facts.head_dim, facts.num_key_value_groups) == (8, 2)


def test_num_keys_is_the_floor_of_the_root() -> None:
    facts = DogeFacts.from_config({**DOGE, "is_moe": True, "num_experts": 24, "num_experts_per_tok": 16})
    assert facts.num_keys == 4


def test_json_round_trip() -> None:
    facts = DogeFacts.from_config({**DOGE, "eos_token_id": [1, 7], "rope_theta": 4e4})
    assert DogeFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert facts.eos_token_ids == (1, 7)
    assert hash(facts)


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (1, (1,)), ([3, 1], (3, 1))])
def test_eos_token_ids(eos: Any, ids: tuple[int, ...]) -> None:
    assert DogeFacts.from_config({**DOGE, "eos_token_id": eos}).eos_token_ids == ids


HALF = [1.0 + 0.1 * i for i in range(64)]
ROPES: dict[str, dict[str, Any]] = {
    "absent": {},
    "theta-only": {"rope_theta": 4e4},
    "null-scaling": {"rope_scaling": None, "rope_theta": 1e4},
    "4.x-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 1e4},
    "4.x-dynamic-as-published": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048},
        "rope_theta": 10000.0,
    },
    "4.x-type": {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500.0},
    "both-spellings-agree": {
        "rope_scaling": {"type": "linear", "factor": 2},
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 500.0},
    },
    "5.x-default": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "5.x-without-theta": {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16,
            "truncate": False,
        }
    },
    "yarn-original-by-default": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": HALF, "long_factor": HALF,
            "original_max_position_embeddings": 512,
        }
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("config", ROPES.values(), ids=ROPES.keys())
def test_rope_is_read_as_transformers_reads_it(config: dict[str, Any]) -> None:
    facts = DogeFacts.from_config({**DOGE, **config})
    reference = dict(DogeConfig(**json.loads(json.dumps(config))).rope_parameters)
    reference.pop("type", None)
    if facts.rope_type == "dynamic":  # transformers keeps this key and never reads it
        reference.pop("original_max_position_embeddings", None)
    assert facts.rope == reference


def test_stateless_length() -> None:
    def length(rope: dict[str, Any]) -> int | None:
        return DogeFacts.from_config({**DOGE, "rope_parameters": rope}).stateless_length

    assert length({"rope_type": "default"}) is None
    assert length(ROPES["yarn"]["rope_parameters"]) is None
    assert length({"rope_type": "dynamic", "factor": 4.0}) == 2048
    assert length({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 512}) == 2048
    assert length(ROPES["longrope"]["rope_parameters"]) == 512


def test_all_findings_are_in_one_message() -> None:
    message = refusal({**DOGE, "hidden_size": -8, "hidden_sise": 8, "keep_window_size": 0, "mlp_bias": 1})
    for word in (
        "hidden_size=-8",
        "'hidden_sise' (did you mean 'hidden_size'?)",
        "keep_window_size=0",
        "mlp_bias=1",
    ):
        assert word in message


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no-model-type": ({"model_type": None}, "not a Doge"),
    "llama": ({"model_type": "llama"}, "model_type='llama'"),
    "token-classification": (
        {"architectures": ["DogeForTokenClassification"]},
        "must be one of ['DogeForCausalLM'], ['DogeForSequenceClassification'], ['DogeModel']",
    ),
    "no-labels": (
        {"architectures": ["DogeForSequenceClassification"], "id2label": {}},
        "id2label={}: must be an object with a name for each label",
    ),
    "one-letter-less": ({"num_attention_head": 4}, "did you mean 'num_attention_heads'?"),
    "one-letter-more": ({"keep_windows_size": 4}, "did you mean 'keep_window_size'?"),
    "two-letters-changed": ({"hidden_zice": 64}, "did you mean 'hidden_size'?"),
    "letters-swapped": ({"vocab_szie": 64}, "did you mean 'vocab_size'?"),
    "other-case": ({"Vocab_Size": 64}, "unknown key 'Vocab_Size'"),
    "misspelt-refused-key": ({"quantisation_config": {"bits": 4}}, "unknown key 'quantisation_config'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
    "encoder-decoder": ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
    "per-layer": ({"per_layer_config": {"0": {}}}, "per_layer_config"),
    "phi3-original-length": ({"original_max_position_embeddings": 8}, "belongs inside rope_parameters"),
    "string-size": ({"hidden_size": "64"}, "hidden_size='64': must be a whole number >= 1"),
    "float-size": ({"hidden_size": 64.0}, "hidden_size=64.0"),
    "boolean-size": ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    "null-size": ({"vocab_size": None}, "vocab_size=None"),
    "zero-layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "heads-not-divisible": (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "num_key_value_heads=3: must be a divisor of num_attention_heads=4",
    ),
    "odd-head": ({"head_dim": 5}, "head_dim=5: a head must have an even size"),
    "odd-derived-head": (
        {"hidden_size": 9, "num_attention_heads": 3},
        "hidden_size=9 // num_attention_heads=3 = 3: a head must have an even size",
    ),
    "no-head": ({"hidden_size": 2, "num_attention_heads": 4}, "num_attention_heads=4 = 0"),
    "null-head": ({"head_dim": None}, "head_dim=None"),
    "nan-eps": ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan: must be a finite number >= 0"),
    "text-eps": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
    "huge-eps": ({"rms_norm_eps": 10**400}, "must be a finite number"),
    "activation": ({"hidden_act": "sillu"}, "(did you mean 'silu'?)"),
    "sliding-window-of-one": ({"sliding_window": 1}, "sliding_window=1: must be null or a whole number >= 2"),
    "sliding-window-of-none": ({"sliding_window": 0}, "sliding_window=0: must be null or a whole number >= 2"),
    "too-many-experts": (
        {"is_moe": True, "num_experts": 20, "num_experts_per_tok": 17},
        "num_experts_per_tok=17: must be at most 16, the reachable experts of num_experts=20",
    ),
    "pad-outside": ({"vocab_size": 10, "pad_token_id": 10}, "from 0 to vocab_size-1 = 9"),
    "eos-list-outside": ({"vocab_size": 10, "eos_token_id": [1, 10]}, "eos_token_id=[1, 10]"),
    "dtype": ({"torch_dtype": "float64"}, "torch_dtype='float64': must be one of bfloat16, float16, float32"),
    "dropout": ({"attention_dropout": "none"}, "attention_dropout='none'"),
    "rope-type": ({"rope_parameters": {"rope_type": "yarm", "factor": 2.0}}, "(did you mean 'yarn'?)"),
    "rope-proportional": ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type='proportional'"),
    "rope-no-factor": ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type='dynamic' needs 'factor'"),
    "rope-factor": ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5"),
    "rope-unknown-key": ({"rope_parameters": {"rope_type": "linear", "factor": 2, "facto": 1}}, "'facto'"),
    "rope-partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    "rope-theta": ({"rope_theta": -1.0}, "rope_theta=-1.0"),
    "rope-not-an-object": ({"rope_scaling": "dynamic"}, "rope_scaling='dynamic': must be an object"),
    "rope-contradiction": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        "contradict each other",
    ),
    "rope-two-thetas": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        "rope_theta=10000.0 contradicts rope_parameters.rope_theta=50000.0",
    ),
    "rope-two-types": (
        {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
        "rope_type='linear' contradicts type='dynamic'",
    ),
    "dynamic-head-of-two": (
        {"head_dim": 2, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "head_dim=2 with rope_type='dynamic'",
    ),
    "longrope-lengths": (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": HALF}},
        "short_factor has 1 numbers: must be head_dim/2 = 64",
    ),
    "llama3-order": (
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
            }
        },
        "low_freq_factor=4.0: must be less than high_freq_factor=4.0",
    ),
    "yarn-order": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 32}},
        "beta_fast=1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(change: dict[str, Any], words: str) -> None:
    assert words in refusal({**DOGE, **change})


IGNORED: dict[str, tuple[dict[str, Any], str]] = {
    "legacy-mask-ratio": ({"dynamic_mask_ratio": 0.0}, "legacy config: dynamic_mask_ratio=0.0"),
    "legacy-experts": (
        {"num_cdmoe_experts": 9, "num_cdmoe_heads": 4},
        "legacy config: num_cdmoe_experts=9, num_cdmoe_heads=4",
    ),
    "legacy-unheard-of": ({"num_cdmoe_something": 1}, "legacy config: num_cdmoe_something=1"),
    "legacy-bias": ({"hidden_bias": False}, "legacy config: hidden_bias=False"),
    "legacy-retrieval": ({"expert_retrieval_size": 64}, "legacy config: expert_retrieval_size=64"),
    "js": ({"transformers.js_config": {}}, "unknown key 'transformers.js_config'"),
    "unsloth": ({"unsloth_version": "2025.6.1"}, "unknown key 'unsloth_version'"),
    "three-letters-off": ({"keep_window": 8}, "unknown key 'keep_window'"),
    "another-model": ({"n_layer": 3}, "unknown key 'n_layer'"),
}
"""Keys that transformers ignores: ignored here too, and said; with `strict` refused, with these words."""


@pytest.mark.parametrize(("change", "words"), IGNORED.values(), ids=IGNORED.keys())
def test_what_transformers_ignores_is_ignored_and_named(change: dict[str, Any], words: str) -> None:
    config = {**DOGE, **change}
    assert DogeFacts.from_config(config) == DogeFacts.from_config(DOGE)
    assert config_keys.ignored_keys(config) == [f"{key}={value!r}" for key, value in change.items()]
    with pytest.raises(UnsupportedModelError, match=re.escape(words)):
        DogeFacts.from_config(config, strict=True)


def test_legacy_keys_are_refused_where_they_mean_something() -> None:
    with pytest.raises(UnsupportedModelError, match="legacy config: dynamic_mask_ratio"):
        DogeFacts.from_config({**DOGE, "dynamic_mask_ratio": 0.0}, refuse_legacy=True)
    DogeFacts.from_config({**DOGE, "n_layer": 3}, refuse_legacy=True)


def test_nothing_is_said_about_a_config_that_transformers_wrote() -> None:
    assert config_keys.ignored_keys(DogeConfig().to_dict()) == []


def test_misspelt_counts_letters() -> None:
    for name in ("hiddensize", "hidden_siz", "hiden_size", "hidden_sizes", "ihdden_siez", "hidden_size__"):
        assert misspelt(name, ["hidden_size"]), name
    for name in ("hidden_size", "hidden", "hidden_sizes__", "hixxxn_size", ""):
        assert not misspelt(name, ["hidden_size"]), name


ACCEPTED: dict[str, dict[str, Any]] = {
    "code-map": {"auto_map": {"AutoModelForCausalLM": "modeling_doge.DogeForCausalLM"}},
    "null-window": {"sliding_window": None},
    "window": {"sliding_window": 2},
    "null-quantisation": {"quantization_config": None},
    "dense-with-default-experts": {"is_moe": False, "num_experts": 4, "num_experts_per_tok": 64},
    "wide-head": {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 128},
    "null-kv-heads": {"num_attention_heads": 4, "num_key_value_heads": None},
    "no-architecture": {"architectures": None},
    "old-dtype-key": {"torch_dtype": "bfloat16", "transformers_version": "4.55.4"},
    "generation-settings": {"max_length": 20, "do_sample": True, "temperature": 0.8},
    "bare-model": {"architectures": ["DogeModel"]},
    "null-dropout": {"attention_dropout": None},
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(change: dict[str, Any]) -> None:
    DogeFacts.from_config({**DOGE, **change})


@pytest.mark.parametrize("labels", [{}, {"num_labels": 1}, {"num_labels": 5}, {"id2label": {"0": "no", "1": "yes"}}])
def test_labels_are_counted_as_transformers_counts_them(labels: dict[str, Any]) -> None:
    config = {"architectures": ["DogeForSequenceClassification"], **labels}
    reference = DogeConfig.from_dict({**DOGE, **config})
    assert DogeFacts.from_config({**DOGE, **config}).num_labels == reference.num_labels


def test_join_findings_counts_the_rest() -> None:
    assert join_findings(["a", "b", "c"], limit=2) == "a; b; and 1 more"
    assert join_findings(["a", "b"], limit=2) == "a; b"


def test_suggest_says_nothing_where_nothing_is_near() -> None:
    assert suggest("zzz", ["hidden_size"]) == ""


def test_config_imports_nothing_heavy() -> None:
    code = (
        "import sys, doge_deploy.config.model, doge_deploy.errors\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'numpy', 'yaml'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
