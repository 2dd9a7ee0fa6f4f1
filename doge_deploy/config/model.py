"""Facts read from a checkpoint's config.json: what would change the model and is not understood is refused.

Choices that a user makes are in `options.py`. Every command reads facts, so nothing heavy is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from doge_deploy.config.keys import (
    ACTIVATIONS,
    INERT_DOGE_KEYS,
    ConfigReader,
    is_integer,
    key_findings,
)
from doge_deploy.config.revisions import REVISIONS, TRANSFORMERS
from doge_deploy.config.rope import STATEFUL_TYPES, read_rope
from doge_deploy.diagnostics import join_findings, shortened
from doge_deploy.dtypes import FLOATS
from doge_deploy.errors import UnsupportedModelError

ARCHITECTURE = "DogeForCausalLM"

TASKS = {
    "DogeForCausalLM": ("causal-lm", "features"),
    "DogeForSequenceClassification": ("sequence-classification", "features"),
    "DogeModel": ("features",),
}
"""What a checkpoint of each architecture has the weights for."""


@dataclass(frozen=True)
class DogeFacts:
    """What a checkpoint is. Names are transformers' own; sizes count elements, lengths count tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: Mapping[str, Any] = field(hash=False)
    """`rope_type`, `rope_theta` and the parameters that the type reads, in transformers' 5.x form."""
    original_max_position_embeddings: int
    """Length the angles were made for: where the type has no such parameter, `max_position_embeddings`."""
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    keep_window_size: int
    is_moe: bool
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    architecture: str = ARCHITECTURE
    """A key of `TASKS`."""
    num_labels: int | None = None
    """Of a sequence classification."""
    revision: str = TRANSFORMERS
    """A name of `doge_deploy.config.revisions.REVISIONS`; a config.json does not say it, the tensors do."""

    @property
    def is_legacy(self) -> bool:
        """Of the original SmallDoge code, which transformers cannot load."""
        return self.revision != TRANSFORMERS

    @property
    def qk_norm(self) -> bool:
        """Queries and keys are RMS-normalised per head; without it there are no `q_norm` and `k_norm` tensors."""
        return REVISIONS[self.revision].qk_norm

    @property
    def num_score_heads(self) -> int:
        """Heads of the dynamic mask's score: the query heads in a legacy Doge, else the key/value heads."""
        per_query_head = REVISIONS[self.revision].score_per_query_head
        return self.num_attention_heads if per_query_head else self.num_key_value_heads

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_keys(self) -> int:
        """Router keys per half: floor(sqrt(E)). Experts from num_keys**2 on are never reached."""
        return math.isqrt(self.num_experts)

    @property
    def rope_type(self) -> str:
        """One of default, linear, dynamic, yarn, longrope, llama3."""
        return str(self.rope["rope_type"])

    @property
    def stateless_length(self) -> int | None:
        """Length up to which the angles of a position are always the same; None where they always are.

        Reference: `dynamic_rope_update` in transformers' modeling_rope_utils.py.
        """
        return self.original_max_position_embeddings if self.rope_type in STATEFUL_TYPES else None

    def rope_changes(self, max_length: int) -> bool:
        """Whether rows of up to `max_length` tokens reach past `stateless_length`."""
        return self.stateless_length is not None and max_length > self.stateless_length

    def rope_remembers(self, max_length: int) -> bool:
        """Whether the angles of a call then depend on earlier calls too; those of longrope do on the call alone."""
        return self.rope_changes(max_length) and self.rope_type == "dynamic"

    def rope_shapes(self, max_length: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what `doge_deploy.model.rope.rope_tensors` gives."""
        half = self.head_dim // 2
        if not self.rope_changes(max_length):
            return {"rope_cos": (max_length, half), "rope_sin": (max_length, half)}
        assert self.stateless_length is not None
        rows = max_length - self.stateless_length + 1 if self.rope_remembers(max_length) else 2
        return {"rope_frequencies": (rows, half), "rope_scaling": (1,)}

    def keep_window(self, max_length: int) -> bool:
        """Whether a row of `max_length` tokens can see more keys than it keeps."""
        visible = max_length if self.sliding_window is None else min(max_length, self.sliding_window)
        return visible > self.keep_window_size

    def reachable_windows(self, max_length: int, *, padded: bool = False) -> tuple[int, int]:
        """`keep_window_size` and `sliding_window`; 0 where it can hide no key of a row of `max_length` tokens.

        Args:
            max_length: tokens of a row.
            padded: padding takes up slots, as in a growing cache, so that shorter texts leave a sliding window too.
        """
        sliding = self.sliding_window or 0
        if not padded and sliding >= max_length:
            sliding = 0
        return self.keep_window_size if self.keep_window(max_length) else 0, sliding

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a text, none if the checkpoint names none."""
        eos = self.eos_token_id
        if eos is None:
            return ()
        return eos if isinstance(eos, tuple) else (eos,)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest; `from_json` takes them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DogeFacts:
        """The facts that `to_json` wrote, after a trip through JSON.

        Raises:
            TypeError: keys are missing or too many.
        """
        eos = data.get("eos_token_id")
        return cls(**{**data, "eos_token_id": tuple(eos) if isinstance(eos, list) else eos})

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        source: str = "config.json",
        *,
        strict: bool = False,
        refuse_legacy: bool = False,
    ) -> DogeFacts:
        """The facts of a parsed config.json, with transformers' defaults for absent keys.

        Args:
            config: the JSON object.
            source: what to call it in a message.
            strict, refuse_legacy: see `key_findings`.

        Raises:
            UnsupportedModelError: not a Doge, or keys that are misspelt, ill-typed, contradictory or not supported:
                all of them in one message.
        """
        check_model_type(config, source)
        reader = ConfigReader(config)
        reader.findings += key_findings(config, strict=strict, refuse_legacy=refuse_legacy)
        values = _read_sizes(reader)
        values |= _read_experts(reader)
        values |= _read_token_ids(reader, values["vocab_size"])
        values["rope"], rope_findings = read_rope(config, values["head_dim"], values["max_position_embeddings"])
        reader.findings += rope_findings
        values["original_max_position_embeddings"] = values["rope"].get(
            "original_max_position_embeddings", values["max_position_embeddings"]
        )
        values["architecture"] = (config.get("architectures") or [ARCHITECTURE])[0]
        if values["architecture"] == "DogeForSequenceClassification":
            values["num_labels"] = _read_num_labels(reader)
        _check_inert(reader)
        if reader.findings:
            raise UnsupportedModelError(f"{source}: {join_findings(reader.findings)}")
        return cls(**values)


def check_model_type(config: Mapping[str, Any], source: str = "config.json") -> None:
    """Refuse a config of another model, before anything else is said about it.

    Raises:
        UnsupportedModelError: `model_type` is not "doge", or the architecture not one of `TASKS`.
    """
    model_type = config.get("model_type")
    if model_type != "doge":
        raise UnsupportedModelError(shortened(f"{source}: model_type={model_type!r}: not a Doge; must be 'doge'"))
    architectures = config.get("architectures")
    if architectures is None or architectures in [[name] for name in TASKS]:
        return
    legal = ", ".join(f"['{name}']" for name in TASKS)
    raise UnsupportedModelError(shortened(f"{source}: architectures={architectures!r}: must be one of {legal}"))


def _read_sizes(reader: ConfigReader) -> dict[str, Any]:
    heads = reader.size("num_attention_heads", 8)
    values: dict[str, Any] = {
        "vocab_size": reader.size("vocab_size", 32768),
        "hidden_size": reader.size("hidden_size", 1024),
        "intermediate_size": reader.size("intermediate_size", 2048),
        "num_hidden_layers": reader.size("num_hidden_layers", 32),
        "num_attention_heads": heads,
        "num_key_value_heads": _read_key_value_heads(reader, heads),
        "hidden_act": reader.name("hidden_act", "silu", ACTIVATIONS),
        "rms_norm_eps": reader.non_negative("rms_norm_eps", 1e-6),
        "tie_word_embeddings": reader.flag("tie_word_embeddings"),
        "max_position_embeddings": reader.size("max_position_embeddings", 2048),
        "attention_bias": reader.flag("attention_bias"),
        "mlp_bias": reader.flag("mlp_bias"),
        "keep_window_size": reader.size("keep_window_size", 2048),
        "sliding_window": _read_sliding_window(reader),
    }
    values["head_dim"] = _read_head_dim(reader, values["hidden_size"], heads)
    return values


def _read_sliding_window(reader: ConfigReader) -> int | None:
    """A window of 1 is refused: transformers' cache then keeps every key, and its calls fail or see all of them.

    Reference: `DynamicSlidingWindowLayer.update` in transformers' cache_utils.py, where `-1 + 1` slices nothing off.
    """
    window = reader.config.get("sliding_window")
    if window is None or (is_integer(window) and window >= 2):
        return window
    reader.note("sliding_window", "null or a whole number >= 2")
    return None


def _read_key_value_heads(reader: ConfigReader, heads: int) -> int:
    if reader.config.get("num_key_value_heads") is None:
        return heads
    kv_heads = reader.size("num_key_value_heads", heads)
    if heads % kv_heads:
        reader.note("num_key_value_heads", f"a divisor of num_attention_heads={heads}")
        return heads
    return kv_heads


def _read_head_dim(reader: ConfigReader, hidden_size: int, heads: int) -> int:
    """Size of a head, which must be even: rotation works on its two halves."""
    if "head_dim" in reader.config:
        head_dim = reader.size("head_dim", 2)
        source = f"head_dim={head_dim}"
    else:
        head_dim = hidden_size // heads
        source = f"hidden_size={hidden_size} // num_attention_heads={heads} = {head_dim}"
    if head_dim < 2 or head_dim % 2:
        reader.findings.append(f"{source}: a head must have an even size >= 2")
        return 2
    return head_dim


def _read_experts(reader: ConfigReader) -> dict[str, Any]:
    values = {
        "is_moe": reader.flag("is_moe"),
        "num_experts": reader.size("num_experts", 16384),
        "num_experts_per_tok": reader.size("num_experts_per_tok", 64),
        "norm_topk_prob": reader.flag("norm_topk_prob"),
    }
    reachable = math.isqrt(values["num_experts"]) ** 2
    # a dense model keeps the defaults of these keys, whatever they say about each other
    if values["is_moe"] and values["num_experts_per_tok"] > reachable:
        legal = f"at most {reachable}, the reachable experts of num_experts={values['num_experts']}"
        reader.note("num_experts_per_tok", legal)
    return values


def _read_token_ids(reader: ConfigReader, vocab_size: int) -> dict[str, Any]:
    return {
        "bos_token_id": reader.token_id("bos_token_id", vocab_size),
        "eos_token_id": reader.token_ids("eos_token_id", vocab_size),
        "pad_token_id": reader.token_id("pad_token_id", vocab_size),
    }


def _read_num_labels(reader: ConfigReader) -> int:
    """As transformers counts labels: those of `id2label`, which outweighs `num_labels`; 2 where neither is given."""
    labels = reader.config.get("id2label")
    if labels is None:
        return reader.size("num_labels", 2)
    if not isinstance(labels, Mapping) or not labels:
        reader.note("id2label", "an object with a name for each label")
        return 2
    return len(labels)


def _check_inert(reader: ConfigReader) -> None:
    """Types of keys that change no number, but that transformers, the reference, checks too."""
    for key in sorted(INERT_DOGE_KEYS & reader.config.keys()):
        if key in ("use_cache", "output_router_logits"):
            reader.flag(key)
        elif not (key == "attention_dropout" and reader.config[key] is None):
            reader.non_negative(key, 0.0)
    for key in ("dtype", "torch_dtype"):
        if reader.config.get(key) is not None:
            reader.name(key, "float32", frozenset(FLOATS))
