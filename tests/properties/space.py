"""The space of small Doges, bundles and call sequences, as hypothesis strategies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

from hypothesis import strategies as st

from doge_deploy.graph.functions.activations import SUPPORTED

VOCABULARY = 128
TASKS = ("causal-lm", "causal-lm", "causal-lm", "causal-lm", "sequence-classification", "features")


@dataclass(frozen=True)
class Example:
    """One checkpoint, the bundle made of it, and the calls that it is verified with."""

    config: dict[str, Any]
    """Of transformers' DogeConfig."""
    saved: str
    """The task that the checkpoint has a head for."""
    options: dict[str, Any]
    """Of `ExportOptions`."""
    calls: tuple[tuple[int, ...], ...]
    """Tokens of each row in each call; shorter rows are padded."""
    repeating: bool
    """Text whose tokens repeat, so that scores tie."""
    seed: int

    @property
    def task(self) -> str:
        return str(self.options.get("task", "causal-lm"))

    @property
    def longest(self) -> int:
        return max(sum(sizes) for sizes in zip(*self.calls, strict=True))

    def features(self) -> Iterator[str]:
        """What of the space this example is in, a line each of the report."""
        config, options = self.config, self.options
        rope = config["rope_parameters"]["rope_type"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        layout = options.get("kv_cache", ("uncached",))[0]
        yield f"task {self.task}"
        yield f"layout {layout}"
        yield f"dtype {options['dtype']}"
        yield f"rope_type {rope}"
        if rope in ("dynamic", "longrope") and self.longest > original_length(config):
            yield f"rope_type {rope}, text beyond the original length"
        yield f"G = {heads // kv_heads}"
        yield f"hidden_act {config['hidden_act']}"
        if heads == kv_heads == 1:
            yield "H = Hkv = 1"
        if "head_dim" in config:
            yield "head_dim given"
        for flag in ("attention_bias", "mlp_bias", "tie_word_embeddings", "is_moe"):
            if config[flag]:
                yield flag
        if self.longest > config["keep_window_size"]:
            yield "text longer than keep_window_size"
        if config["keep_window_size"] == 1:
            yield "keep_window_size 1"
        if config["sliding_window"]:
            yield "sliding_window"
            if self.longest > config["sliding_window"]:
                yield "text longer than sliding_window"
        if config["is_moe"]:
            experts, k = config["num_experts"], config["num_experts_per_tok"]
            yield f"routing {options['routing']}"
            if isqrt(experts) ** 2 != experts:
                yield "num_experts not a square"
            if k == isqrt(experts) ** 2:
                yield "num_experts_per_tok all that can be reached"
            if config["norm_topk_prob"]:
                yield "norm_topk_prob"
        if config["pad_token_id"] is None:
            yield "no pad_token_id"
        yield f"rows {len(self.calls[0])}"
        if len(self.calls) > 1:
            yield "several calls"
        if any(len(set(sizes)) > 1 for sizes in self.calls):
            yield "rows of different length in a call"
        if self.repeating:
            yield "repeating tokens"


def original_length(config: dict[str, Any]) -> int:
    """Where the angles of `dynamic` and `longrope` begin to change."""
    return int(config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"]))


@st.composite
def ropes(draw: st.DrawFn, half: int, length: int) -> dict[str, Any]:
    """Parameters of any type, for heads of `2 * half`; `dynamic` needs heads of 4 or more."""
    kinds = ["default", "linear", "yarn", "longrope", "llama3", *(["dynamic"] * 2 if half > 1 else [])]
    kind = draw(st.sampled_from(kinds))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 1e4, 4e4]))}
    if kind != "default" and kind != "longrope":
        rope["factor"] = draw(st.sampled_from([1.0, 2.0, 4.0]))
    if kind in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = draw(st.integers(4, length))
    if kind == "longrope":
        factors = st.lists(st.sampled_from([1.0, 1.5, 2.0, 4.0]), min_size=half, max_size=half)
        rope |= {"short_factor": draw(factors), "long_factor": draw(factors)}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([2.0, 4.0]))}
    return rope


@st.composite
def configs(draw: st.DrawFn, hidden_act: str | None) -> dict[str, Any]:
    """A config of one or two layers, with any activation where none is named."""
    kv_heads, groups = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * groups
    size = draw(st.sampled_from([2, 4, 6, 8, 16]))
    hidden = heads * draw(st.sampled_from([2, 4, 8])) if draw(st.booleans()) else heads * size
    length = draw(st.integers(6, 40))
    experts = draw(st.integers(1, 40))
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(1, 24)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": hidden_act or draw(st.sampled_from(sorted(SUPPORTED))),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "initializer_range": draw(st.sampled_from([0.02, 0.2])),
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": length,
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "sliding_window": draw(st.none() | st.integers(2, 20)),
        "keep_window_size": draw(st.sampled_from([1, 2, 3, 5, 8, 13, 64])),
        "is_moe": draw(st.booleans()),
        "num_experts": experts,
        "num_experts_per_tok": min(draw(st.integers(1, 36)), isqrt(experts) ** 2),
        "norm_topk_prob": draw(st.booleans()),
        "pad_token_id": draw(st.sampled_from([2, 2, None])),
    }
    if size * heads != hidden or draw(st.booleans()):
        config["head_dim"] = size
    config["rope_parameters"] = draw(ropes(size // 2, length))
    return config


@st.composite
def examples(draw: st.DrawFn, hidden_act: str | None = None) -> Example:
    """Anything that an export accepts."""
    config = draw(configs(hidden_act))
    task = draw(st.sampled_from(TASKS))
    saved = task if task != "features" else draw(st.sampled_from(["features", "causal-lm", "sequence-classification"]))
    options: dict[str, Any] = {
        "task": task,
        "dtype": draw(st.sampled_from(["fp32", "fp32", "fp32", "fp16", "bf16"])),
        "max_length": draw(st.integers(4, 40)),
        "routing": draw(st.sampled_from(["reference", "per-token"])),
    }
    if config["hidden_act"] == "xielu" and options["dtype"] == "fp16":
        options["dtype"] = "bf16"  # transformers fails in float16
    rows = draw(st.sampled_from([1, 1, 2, 3]))
    count = draw(st.integers(1, 5))
    if task == "causal-lm":
        options["kv_cache"] = (draw(st.sampled_from(["static", "growing"])),)
        options["logits"] = draw(st.sampled_from(["last", "all"]))
    else:
        count = 1
        rows = 1 if task == "sequence-classification" and config["pad_token_id"] is None else rows
    calls: list[tuple[int, ...]] = []
    held = [0] * rows
    for _ in range(count):
        room = options["max_length"] - max(held)
        if room < 1:
            break
        width = draw(st.integers(1, min(room, draw(st.sampled_from([1, 6, 40])))))
        sizes = [width, *(draw(st.integers(1, width)) for _ in range(rows - 1))]
        sizes = draw(st.permutations(sizes))
        held = [before + size for before, size in zip(held, sizes, strict=True)]
        calls.append(tuple(sizes))
    return Example(config, saved, options, tuple(calls), draw(st.booleans()), draw(st.integers(0, 999)))
