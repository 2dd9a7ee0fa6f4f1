"""Which keys a config.json may have, and typed access to them that collects what is wrong and goes on.

transformers keeps unknown keys silently, so that a misspelt key leaves a default in force unseen. Here every key is
used, known to change nothing, ignored with a warning, or a finding: one that is nearly a known one was misspelt.
Reference: `DogeConfig` and `PreTrainedConfig` of transformers 4.54 to 5.23.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from doge_deploy.diagnostics import misspelt, shortened, suggest

USED_KEYS = frozenset(
    """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim hidden_act rms_norm_eps tie_word_embeddings
    max_position_embeddings rope_parameters rope_scaling rope_theta attention_bias mlp_bias
    sliding_window keep_window_size is_moe num_experts num_experts_per_tok norm_topk_prob bos_token_id
    eos_token_id pad_token_id dtype torch_dtype
    """.split()
)
"""Keys whose value is read here."""

INERT_DOGE_KEYS = frozenset(
    """
    hidden_dropout attention_dropout initializer_range use_cache output_router_logits router_aux_loss_coef
    """.split()
)
"""Keys of DogeConfig that change nothing in eval mode."""

STANDARD_KEYS = frozenset(
    """
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation
    _attn_implementation_autoset _experts_implementation experts_implementation transformers_version
    auto_map tokenizer_class output_hidden_states output_attentions return_dict return_dict_in_generate
    output_scores torchscript use_return_dict use_bfloat16 tf_legacy_loss chunk_size_feed_forward
    is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention tie_encoder_decoder
    pruned_heads finetuning_task id2label label2id num_labels task_specific_params problem_type
    prefix_token_id sep_token_id decoder_start_token_id tie_last_hidden_states max_length max_new_tokens
    min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens epsilon_cutoff eta_cutoff num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
    """.split()
)
"""Keys of every PreTrainedConfig, and old generation settings, that change none of a Doge's numbers."""

MUST_BE_OFF = frozenset("is_encoder_decoder is_decoder add_cross_attention pruned_heads tie_encoder_decoder".split())
"""Standard keys that would make another model, were they set."""

LEGACY_KEYS = frozenset(
    """
    dynamic_mask_ratio hidden_bias expert_retrieval_size num_cdmoe_experts num_cdmoe_heads
    num_cdmoe_experts_per_head num_cdmmoe_experts num_cdmmoe_heads num_cdmmoe_experts_per_head
    private_expert_intermediate_size
    """.split()
)
"""Keys that only the original SmallDoge code reads."""

REFUSED_KEYS = {
    "quantization_config": "quantized weights are not supported; export from the original checkpoint",
    "per_layer_config": "layers that differ from each other are not supported",
    "original_max_position_embeddings": "belongs inside rope_parameters",
    "partial_rotary_factor": "a partly rotated head is not supported",
}
"""Keys with a meaning that an export would lose."""

KNOWN_KEYS = USED_KEYS | INERT_DOGE_KEYS | STANDARD_KEYS

ACTIVATIONS = frozenset(
    """
    gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh
    hardswish laplace leaky_relu linear mish prelu quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus
    swish tanh xielu
    """.split()
)
"""Names in transformers' `ACT2FN`, listed here so that reading a config imports no transformers."""

TRAINED_ACTIVATIONS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "prelu": {"weight": (1,)},
    "xielu": {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()},
}
"""Activations with weights of their own: name and shape of each, by which a checkpoint has them in `mlp.act_fn`.

Buffers count too where transformers saves them and does not know their values without.
"""


MAX_SIZE = 2**31 - 1
"""Of anything counted. No Doge comes near it, and arithmetic with sizes stays within 64 bits."""


def legacy_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys of the original SmallDoge code that `config` has, sorted."""
    prefixes = ("num_cdmoe_", "num_cdmmoe_")
    return sorted(key for key in config if key in LEGACY_KEYS or key.startswith(prefixes))


def key_findings(config: Mapping[str, Any], *, strict: bool = False, refuse_legacy: bool = False) -> list[str]:
    """One finding per key that is refused, switched on where it must be off, or within two letters of a known one.

    Args:
        config: the JSON object.
        strict: refuse every key that transformers ignores.
        refuse_legacy: refuse keys of the original code: they mean something in a checkpoint of its layout.
    """
    legacy = legacy_keys(config)
    findings = []
    if legacy and (strict or refuse_legacy):
        keys = ", ".join(f"{key}={config[key]!r}" for key in legacy)
        findings.append(f"legacy config: {keys} (of the original SmallDoge code, ignored by transformers)")
    for key, value in config.items():
        if key in legacy:
            continue
        if key in REFUSED_KEYS:
            if value is not None:
                findings.append(f"{key}={value!r}: {REFUSED_KEYS[key]}")
        elif key in MUST_BE_OFF:
            if value:
                findings.append(f"{key}={value!r}: not a Doge setting; must be absent, false or empty")
        elif key not in KNOWN_KEYS and (strict or misspelt(key, _MEANT)):
            findings.append(f"unknown key {key!r}{suggest(key, USED_KEYS | INERT_DOGE_KEYS)}")
    return findings


_MEANT = USED_KEYS | INERT_DOGE_KEYS | REFUSED_KEYS.keys() | MUST_BE_OFF
"""Keys that a misspelt one may have been meant for."""


def ignored_keys(config: Mapping[str, Any]) -> list[str]:
    """`key=value` of the keys that `key_findings` passes over although nothing is known of them."""
    return [
        shortened(f"{key}={value!r}")
        for key, value in config.items()
        if (key in LEGACY_KEYS or key not in KNOWN_KEYS) and key not in REFUSED_KEYS
    ]


def is_number(value: Any) -> bool:
    """An int or float in the range of a double; JSON's booleans are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class ConfigReader:
    """Reads keys by type; for a bad value it notes a finding, takes the default and goes on."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.findings: list[str] = []

    def note(self, key: str, legal: str) -> None:
        """Record that the value of `key` is not `legal`."""
        self.findings.append(f"{key}={self.config.get(key)!r}: must be {legal}")

    def size(self, key: str, default: int) -> int:
        """A whole number of at least 1."""
        value = self.config.get(key, default)
        if not is_integer(value) or value < 1:
            self.note(key, "a whole number >= 1")
            return default
        if value > MAX_SIZE:
            self.note(key, f"at most {MAX_SIZE}")
            return default
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key, default)
        if isinstance(value, bool):
            return value
        self.note(key, "true or false")
        return default

    def non_negative(self, key: str, default: float) -> float:
        """A finite number of at least 0."""
        value = self.config.get(key, default)
        if is_number(value) and value >= 0:
            return float(value)
        self.note(key, "a finite number >= 0")
        return default

    def name(self, key: str, default: str, legal: frozenset[str]) -> str:
        """One of the names `legal`."""
        value = self.config.get(key, default)
        if isinstance(value, str) and value in legal:
            return value
        self.note(key, f"one of {', '.join(sorted(legal))}{suggest(str(value), legal)}")
        return default

    def token_id(self, key: str, vocab_size: int) -> int | None:
        """An id of the vocabulary, or None."""
        value = self.config.get(key)
        if value is None or _in_vocabulary(value, vocab_size):
            return value
        self.note(key, f"null or a whole number from 0 to vocab_size-1 = {vocab_size - 1}")
        return None

    def token_ids(self, key: str, vocab_size: int) -> int | tuple[int, ...] | None:
        """An id of the vocabulary, several of them, or None."""
        value = self.config.get(key)
        if not isinstance(value, list):
            return self.token_id(key, vocab_size)
        if value and all(_in_vocabulary(item, vocab_size) for item in value):
            return tuple(value)
        self.note(key, f"null or whole numbers from 0 to vocab_size-1 = {vocab_size - 1}")
        return None


def _in_vocabulary(value: Any, vocab_size: int) -> bool:
    return is_integer(value) and 0 <= value < vocab_size
