"""Broken checkpoints, each made from a sound one by one act of damage; what must be said about each.

As a script, writes all of them and prints what is said:  python tests/broken_checkpoints.py OUT
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_doge import SMALL_MOE, save_random_doge
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], None]


# Acts of damage: each takes its parameters and returns what is done to a directory.


def config(**changes: Any) -> Damage:
    """Set keys of config.json."""

    def damage(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def tensors(edit: Callable[[Tensors], object]) -> Damage:
    """Change, add or remove tensors."""

    def damage(path: Path) -> None:
        weights = load_file(path / WEIGHTS)
        edit(weights)
        save_file(weights, path / WEIGHTS, metadata={"format": "pt"})

    return damage


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Replace one tensor by a function of itself."""
    return tensors(lambda weights: weights.update({name: value(weights[name]).contiguous()}))


def poison(name: str, *values: float) -> Damage:
    """Overwrite the first elements of one tensor."""

    def edit(weights: Tensors) -> None:
        weights[name].view(-1)[: len(values)] = torch.tensor(values)

    return tensors(edit)


def drop(*names: str) -> Damage:
    return tensors(lambda weights: [weights.pop(name) for name in names])


def add(**shapes: tuple[int, ...]) -> Damage:
    return tensors(lambda weights: weights.update({name: torch.ones(shape) for name, shape in shapes.items()}))


def text(name: str, content: str) -> Damage:
    """Write a file."""
    return lambda path: (path / name).write_text(content, encoding="utf-8") and None


def remove(*names: str) -> Damage:
    return lambda path: [(path / name).unlink() for name in names] and None


def truncate(name: str, size: int) -> Damage:
    """Cut a file; a negative size counts from its end."""

    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:size])

    return damage


def append(name: str, content: bytes) -> Damage:
    return lambda path: (path / name).write_bytes((path / name).read_bytes() + content) and None


def header(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the weight file and leave its data."""

    def damage(path: Path) -> None:
        content = (path / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        edit(entries)
        encoded = json.dumps(entries).encode()
        (path / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])

    return damage


def name_twice(path: Path) -> None:
    """A header in which one name stands for two tensors."""
    content = (path / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text = content[8:end].replace(b'"model.layers.0.input_residual"', b'"model.norm.weight"')
    (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def both(*damages: Damage) -> Damage:
    def damage(path: Path) -> None:
        for each in damages:
            each(path)

    return damage


def shard(path: Path) -> None:
    """Split the weights over two files and an index, as large checkpoints are."""
    weights = load_file(path / WEIGHTS)
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / WEIGHTS).unlink()
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}))


def shard_index(edit: Callable[[dict[str, str]], object]) -> Damage:
    """Shards whose index is changed."""

    def damage(path: Path) -> None:
        shard(path)
        index = json.loads((path / INDEX).read_text())
        edit(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    return damage


def llama_renamed(path: Path) -> None:
    """What a Llama's checkpoint has, under the name of a Doge."""
    weights = load_file(path / WEIGHTS)
    own = ("self_attn.A", "dt_proj", "q_norm", "k_norm", "_residual")
    save_file(
        {name: value for name, value in weights.items() if not any(word in name for word in own)},
        path / WEIGHTS,
    )


def widen_scores(weights: Tensors, heads: int) -> None:
    """A and dt_proj per query head."""
    for name in list(weights):
        if name.endswith((".A", ".dt_proj.weight", ".dt_proj.bias")):
            groups = heads // weights[name].shape[0]
            weights[name] = weights[name].repeat_interleave(groups, dim=0)


def legacy(path: Path) -> None:
    """The layout of the original code's last revision: A and dt_proj per query head, no norms of q and k."""
    heads = json.loads((path / "config.json").read_text())["num_attention_heads"]

    def edit(weights: Tensors) -> None:
        widen_scores(weights, heads)
        for name in list(weights):
            if name.endswith((".q_norm.weight", ".k_norm.weight")):
                del weights[name]

    tensors(edit)(path)


OLD_NAMES = {
    "model.embed_tokens": "model.word_embed",
    "model.norm": "model.final_layernorm",
    "input_layernorm": "pre_layernorm",
    "input_residual": "pre_residual.weight",
    "post_attention_layernorm": "post_layernorm",
    "post_attention_residual": "post_residual.weight",
    "mlp.": "feed_forward.",
}


def rename(name: str) -> str:
    """The name of early 2025."""
    for new, old in OLD_NAMES.items():
        name = name.replace(new, old)
    return name


def legacy_names(weights: Tensors) -> None:
    renamed = {rename(name): value for name, value in weights.items()}
    weights.clear()
    weights.update(renamed)


MARCH_KEYS = ("keep_window_size", "num_experts", "num_experts_per_tok")
NEW_KEYS = ("attention_bias", "mlp_bias", "norm_topk_prob", "sliding_window", "router_aux_loss_coef")


def early(change: Damage, *, norms: bool = False, without: tuple[str, ...] = ()) -> Damage:
    """The layout of March 2025, or of February without `MARCH_KEYS`; then a change of its config."""

    def damage(path: Path) -> None:
        if not norms:
            legacy(path)
        tensors(legacy_names)(path)
        file = path / "config.json"
        keys = {key: value for key, value in json.loads(file.read_text()).items() if key not in (*NEW_KEYS, *without)}
        file.write_text(json.dumps(keys))
        change(path)

    return damage


def pickled(path: Path) -> None:
    """Weights as a pickle that would leave a mark, were it loaded."""
    (path / WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch loaded'\ntR.")


def code_and_unknown_key(path: Path) -> None:
    """A file of code beside the weights that would leave a mark, were it run."""
    (path / "modeling_doge.py").write_text("open('loaded', 'w').close()\n")
    config(auto_map={"AutoModelForCausalLM": "modeling_doge.DogeForCausalLM"}, keep_windows_size=4)(path)


@dataclass(frozen=True)
class Broken:
    """A way to be broken: what is done to a sound checkpoint, and words that its refusal must have."""

    damage: Damage
    words: tuple[str, ...]
    base: str = "dense"
    """Which sound checkpoint it is made from, see `make_bases`."""


LAYER = "model.layers.1."
ACT_FN = [f"model.layers.{layer}.mlp.act_fn.{{}}" for layer in (0, 1)]
QK_NORMS = [f"model.layers.{layer}.self_attn.{name}_norm.weight" for layer in (0, 1) for name in "qk"]

BROKEN: dict[str, Broken] = {
    # the config file
    "config-missing": Broken(remove("config.json"), ("config.json: missing",)),
    "config-not-json": Broken(text("config.json", "{'a': 1}"), ("config.json: not JSON", "line 1 column 2")),
    "config-a-list": Broken(text("config.json", "[]"), ("must be a JSON object, not a list",)),
    "config-not-text": Broken(lambda path: (path / "config.json").write_bytes(b"\xff") and None, ("not JSON",)),
    "config-empty-object": Broken(text("config.json", "{}"), ("model_type=None: not a Doge",)),
    "generation-config-not-json": Broken(text("generation_config.json", "{"), ("generation_config.json: not JSON",)),
    "config-a-directory": Broken(
        both(remove("config.json"), lambda path: (path / "config.json").mkdir()), ("config.json: cannot be read",)
    ),
    "config-of-nested-lists": Broken(text("config.json", "[" * 100_000), ("config.json: not JSON",)),
    "config-with-a-key-twice": Broken(
        text("config.json", '{"model_type": "doge", "hidden_size": 32, "hidden_size": 64}'),
        ("config.json: key 'hidden_size' stands twice",),
    ),
    # what the config says
    "a-flag-as-text": Broken(config(tie_word_embeddings="true"), ("tie_word_embeddings='true': must be true or",)),
    "a-size-as-text": Broken(config(vocab_size="64"), ("vocab_size='64': must be a whole number >= 1",)),
    "a-size-with-a-fraction": Broken(config(num_hidden_layers=2.0), ("num_hidden_layers=2.0: must be a whole number",)),
    "a-size-as-a-flag": Broken(config(num_attention_heads=True), ("num_attention_heads=True: must be a whole number",)),
    "zero-heads": Broken(config(num_attention_heads=0), ("num_attention_heads=0: must be a whole number >= 1",)),
    "a-size-beyond-reason": Broken(config(keep_window_size=10**40), ("000: must be at most 2147483647",)),
    "more-positions-than-float32": Broken(
        config(max_position_embeddings=2**24 + 1), ("max_length=16777217: positions beyond 16777216",)
    ),
    "negative-eps": Broken(config(rms_norm_eps=-1e-6), ("rms_norm_eps=-1e-06: must be a finite number >= 0",)),
    "end-token-outside": Broken(config(eos_token_id=[1, 64]), ("eos_token_id=[1, 64]", "vocab_size-1 = 63")),
    "theta-not-a-number": Broken(config(rope_theta=math.nan, rope_parameters=None), ("rope_theta=nan: must be",)),
    "rope-of-no-type": Broken(config(rope_parameters={"rope_type": "spiral"}), ("rope_type='spiral': must be one of",)),
    "longrope-of-odd-length": Broken(
        config(rope_parameters={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}),
        ("short_factor has 1 numbers: must be head_dim/2 = 4",),
    ),
    "quantized": Broken(config(quantization_config={"bits": 4}), ("quantization_config={'bits': 4}: quantized",)),
    "an-endless-value": Broken(config(hidden_act="silu" * 9999), ("hidden_act='silusilu", "[...]", "tanh")),
    "many-wrong-at-once": Broken(
        config(hidden_size=-1, rms_norm_eps=None, hidden_act="silly", num_experts=0),
        ("hidden_size=-1", "rms_norm_eps=None", "hidden_act='silly'", "num_experts=0"),
    ),
    "other-model": Broken(config(model_type="llama"), ("model_type='llama': not a Doge; must be 'doge'",)),
    "sequence-classifier": Broken(
        config(architectures=["DogeForSequenceClassification"]), ("1 missing: score.weight",)
    ),
    "negative-size": Broken(config(hidden_size=-32), ("hidden_size=-32: must be a whole number >= 1",)),
    "zero-window": Broken(config(keep_window_size=0), ("keep_window_size=0",)),
    "heads-not-divisible": Broken(config(num_key_value_heads=3), ("num_key_value_heads=3", "divisor of num_att")),
    "odd-head": Broken(config(head_dim=7), ("head_dim=7: a head must have an even size",)),
    "nan-eps": Broken(config(rms_norm_eps=math.nan), ("rms_norm_eps=nan",)),
    "unknown-activation": Broken(config(hidden_act="silly"), ("hidden_act='silly'", "did you mean 'silu'?")),
    "misspelt-key": Broken(
        config(keep_window_sise=8), ("unknown key 'keep_window_sise' (did you mean 'keep_window_size'?)",)
    ),
    "code-in-checkpoint": Broken(code_and_unknown_key, ("unknown key 'keep_windows_size'",)),
    "sliding-window": Broken(config(sliding_window=1), ("sliding_window=1: must be null or a whole number >= 2",)),
    "contradictory-rope": Broken(
        config(
            rope_scaling={"rope_type": "linear", "factor": 2.0},
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        ("rope_parameters=", "rope_scaling=", "contradict each other"),
    ),
    "rope-factor-missing": Broken(config(rope_parameters={"rope_type": "dynamic"}), ("needs 'factor': missing",)),
    "too-many-experts": Broken(config(num_experts_per_tok=17), ("at most 16, the reachable experts",), base="moe"),
    # config and tensors disagree
    "layers-too-few": Broken(config(num_hidden_layers=1), ("15 unexpected", "model.layers.1.input_residual")),
    "layers-too-many": Broken(config(num_hidden_layers=3), ("15 missing", "model.layers.2.self_attn.A")),
    "a-billion-layers": Broken(config(num_hidden_layers=10**9), ("num_hidden_layers=1000000000, but only 32",)),
    "other-vocabulary": Broken(
        config(vocab_size=65), ("1 wrong shape: model.embed_tokens.weight is [64, 32], must be",)
    ),
    "biases-announced": Broken(config(attention_bias=True), ("10 missing", "self_attn.dt_proj.bias")),
    "dense-called-moe": Broken(config(is_moe=True), ("6 missing", "mlp.router_gate.weight", "mlp.up_embed.weight")),
    "moe-called-dense": Broken(config(is_moe=False), ("6 unexpected", "mlp.down_embed.weight"), base="moe"),
    "other-number-of-experts": Broken(
        config(num_experts=26),
        ("mlp.router_gate.weight is [8, 32], must be [10, 32]", "must be [26, 32]"),
        base="moe",
    ),
    "prelu-without-its-slope": Broken(
        config(hidden_act="prelu"), ("2 missing: model.layers.0.mlp.act_fn.weight", LAYER + "mlp.act_fn.weight")
    ),
    "prelu-with-a-slope-per-channel": Broken(
        both(config(hidden_act="prelu"), add(**{name.format("weight"): (48,) for name in ACT_FN})),
        ("2 wrong shape", LAYER + "mlp.act_fn.weight is [48], must be [1]"),
    ),
    "xielu-without-its-buffers": Broken(
        both(
            config(hidden_act="xielu"),
            add(**{name.format(weight): (1,) for name in ACT_FN for weight in ("alpha_p", "alpha_n")}),
        ),
        ("4 missing", LAYER + "mlp.act_fn.beta", LAYER + "mlp.act_fn.eps"),
    ),
    "a-slope-that-silu-has-not": Broken(
        add(**{LAYER + "mlp.act_fn.weight": (1,)}), (f"1 unexpected: {LAYER}mlp.act_fn.weight",)
    ),
    "untied-without-head": Broken(config(tie_word_embeddings=False), ("1 missing: lm_head.weight",)),
    # tensors
    "tensors-missing": Broken(
        drop(LAYER + "self_attn.A", "model.norm.weight"),
        ("2 missing", LAYER + "self_attn.A", "model.norm.weight"),
    ),
    "tensors-unexpected": Broken(add(score=(2, 32), extra=(1,)), ("2 unexpected", "score", "extra")),
    "wrong-shapes": Broken(
        both(
            put(LAYER + "self_attn.k_proj.weight", lambda value: value.T),
            put("model.norm.weight", lambda x: x[:31]),
        ),
        (
            "2 wrong shape",
            "k_proj.weight is [32, 16], must be [16, 32]",
            "model.norm.weight is [31], must be [32]",
        ),
    ),
    "everything-at-once": Broken(
        both(
            drop("model.norm.weight"),
            add(extra=(1,)),
            put(LAYER + "self_attn.A", lambda value: value.double()[:1]),
        ),
        ("1 missing", "1 unexpected", "1 wrong shape", "1 dtype not one of"),
    ),
    "float64": Broken(put(LAYER + "self_attn.A", torch.Tensor.double), ("self_attn.A is F64",)),
    "integers": Broken(put("model.norm.weight", torch.Tensor.int), ("model.norm.weight is I32",)),
    "tied-head-differs": Broken(
        tensors(lambda weights: weights.update({HEAD: weights[EMBEDDING] + 1})),
        ("tie_word_embeddings=True, but lm_head.weight is not model.embed_tokens.weight",),
    ),
    "tied-head-of-other-dtype": Broken(
        tensors(lambda weights: weights.update({HEAD: weights[EMBEDDING].half()})),
        ("tie_word_embeddings=True",),
    ),
    "nan": Broken(
        both(poison(LAYER + "mlp.up_proj.weight", math.nan, math.nan), poison("model.norm.weight", math.inf)),
        (LAYER + "mlp.up_proj.weight has 2 NaN", "model.norm.weight has 1 infinities"),
    ),
    "llama-renamed": Broken(
        llama_renamed,
        ("not a Doge's weights: no self_attn.A in any layer", "12 missing", "self_attn.A", "input_residual"),
    ),
    # legacy layouts: of no one revision, or of one that cannot be exact
    "legacy-sized-as-now": Broken(
        drop(*QK_NORMS), ("no self_attn.q_norm", "self_attn.A [2]", "sized by num_key_value_heads: as in transformers")
    ),
    "legacy-with-norms": Broken(
        tensors(lambda weights: widen_scores(weights, 4)),
        ("something of both", "q_norm.weight", "self_attn.A [4]", "sized by num_attention_heads: legacy"),
    ),
    "legacy-one-layer": Broken(
        both(legacy, put(LAYER + "self_attn.A", lambda value: value[:2])),
        ("something of both", LAYER + "self_attn.A [2] sized by num_key_value_heads"),
    ),
    "legacy-of-odd-size": Broken(
        both(legacy, put(LAYER + "self_attn.A", lambda value: value[:3])),
        (LAYER + "self_attn.A [3] sized by neither number of heads",),
    ),
    "legacy-names-mixed": Broken(
        both(legacy, tensors(lambda weights: weights.update({"model.word_embed.weight": weights.pop(EMBEDDING)}))),
        ("model.word_embed.weight: names of early 2025", "12 more: names of mid-2025 and later"),
    ),
    "old-names-with-norms": Broken(
        early(config(dynamic_mask_ratio=0.0), norms=True), ("something of both", "q_norm.weight", "names of early 2025")
    ),
    "old-names-of-no-revision": Broken(
        early(config(dynamic_mask_ratio=0.0), without=MARCH_KEYS),
        ("names of early 2025", "no config key num_cdmoe_*", "no config key keep_window_size"),
    ),
    "old-names-of-two-revisions": Broken(
        early(config(num_cdmoe_experts=16)),
        ("config keys num_cdmoe_experts: February 2025", "config keys keep_window_size, num_experts"),
    ),
    "old-names-of-before": Broken(
        early(config(num_cdmmoe_experts=16)), ("from before February 2025", "num_cdmmoe_experts=16")
    ),
    "mask-ratio": Broken(early(config(dynamic_mask_ratio=0.5)), ("legacy Doge of 2025-03: dynamic_mask_ratio=0.5",)),
    "mask-ratio-of-february": Broken(
        early(config(dynamic_mask_ratio=0.5, num_cdmoe_experts=16), without=MARCH_KEYS),
        ("legacy Doge of 2025-02: dynamic_mask_ratio=0.5", "must be 0.0"),
    ),
    "mixture-of-february": Broken(
        early(config(is_moe=True, num_cdmoe_experts=16, num_cdmoe_heads=2), without=MARCH_KEYS),
        ("legacy Doge of 2025-02: is_moe=True with num_cdmoe_experts=16, num_cdmoe_heads=2",),
    ),
    "mixture-of-march": Broken(
        early(config(is_moe=True)), ("legacy Doge of 2025-03: is_moe=True with num_experts=16384",)
    ),
    "hidden-bias-not-a-flag": Broken(early(config(hidden_bias="no")), ("hidden_bias='no': must be true or false",)),
    "old-names-new-keys": Broken(
        early(config(attention_bias=True)), ("attention_bias=True: the code of 2025-03 has no such key",)
    ),
    "old-names-tensor-missing": Broken(
        both(early(config()), drop("model.layers.1.pre_residual.weight", "model.final_layernorm.weight")),
        ("2 missing: model.layers.1.pre_residual.weight; model.final_layernorm.weight",),
    ),
    "legacy-yarn": Broken(
        both(legacy, config(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4})),
        ("legacy Doge of 2025-08: rope_type='yarn': differs between", "must be one of default, linear"),
    ),
    "legacy-xielu": Broken(
        both(
            legacy,
            config(hidden_act="xielu"),
            add(**{name.format(weight): (1,) for name in ACT_FN for weight in ("alpha_p", "alpha_n")}),
            add(**{name.format(weight): () for name in ACT_FN for weight in ("beta", "eps")}),
        ),
        ("legacy Doge of 2025-08: hidden_act='xielu': came with transformers 4.56",),
    ),
    "legacy-keys-beside-new-names": Broken(
        both(legacy, config(dynamic_mask_ratio=0.0)), ("legacy config: dynamic_mask_ratio=0.0",)
    ),
    "legacy-tensor-missing": Broken(both(legacy, drop(LAYER + "self_attn.A")), ("1 missing: " + LAYER,)),
    # files of weights
    "weights-a-directory": Broken(both(remove(WEIGHTS), lambda path: (path / WEIGHTS).mkdir()), ("cannot be read",)),
    "tensor-named-twice": Broken(name_twice, ("damaged header: key 'model.norm.weight' stands twice",)),
    "infinite-score": Broken(
        both(poison(LAYER + "self_attn.A", 1e30), put(LAYER + "self_attn.dt_proj.weight", lambda value: value * 0)),
        ("the dynamic mask's score overflows float32", "layer 1 head 0"),
    ),
    "no-weights": Broken(remove(WEIGHTS), ("no weights; must hold model.safetensors",)),
    "only-a-pickle": Broken(pickled, ("weights are a pickle, which is never loaded", "pytorch_model.bin")),
    "truncated-data": Broken(truncate(WEIGHTS, -100), ("model.safetensors: truncated:", "bytes expected,")),
    "truncated-header": Broken(truncate(WEIGHTS, 100), ("truncated: at least", "bytes expected, 100 there")),
    "truncated-to-nothing": Broken(truncate(WEIGHTS, 0), ("truncated: at least 8 bytes expected, 0 there",)),
    "too-long": Broken(append(WEIGHTS, b"rest"), ("4 bytes too long",)),
    "git-lfs-pointer": Broken(
        text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("a Git LFS pointer", "lfs pull"),
    ),
    "not-safetensors": Broken(text(WEIGHTS, "hello, world\n"), ("not a safetensors file: it announces",)),
    "name-that-writes-to-the-terminal": Broken(
        add(**{"\x1b[2J\n": (1,)}), ("damaged header: '\\x1b[2J\\n' cannot be the name",)
    ),
    "header-not-json": Broken(
        lambda path: (path / WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"nope") and None,
        ("not a safetensors file: its header is not JSON",),
    ),
    "header-a-list": Broken(
        lambda path: (path / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"[]") and None,
        ("not a safetensors file: its header is not a JSON object",),
    ),
    "header-entry-damaged": Broken(
        header(lambda entries: entries[EMBEDDING].pop("shape")),
        ("damaged header: entry 'model.embed_tokens.weight'",),
    ),
    "header-negative-shape": Broken(
        header(lambda entries: entries[EMBEDDING].update(shape=[-64, -32])), ("damaged header: entry",)
    ),
    "header-shape-lies": Broken(
        header(lambda entries: entries[EMBEDDING].update(shape=[64, 33])),
        ("damaged header", "[64, 33] is given 8192"),
    ),
    "header-tensors-overlap": Broken(
        header(lambda entries: entries["model.norm.weight"].update(data_offsets=[0, 128])), ("must start at",)
    ),
    # shards
    "shards-missing": Broken(
        both(shard, remove("model-00002-of-00002.safetensors")),
        ("shards missing: model-00002-of-00002.safetensors",),
    ),
    "shard-truncated": Broken(
        both(shard, truncate("model-00001-of-00002.safetensors", -4)),
        ("model-00001-of-00002.safetensors: truncated",),
    ),
    "index-not-json": Broken(both(shard, text(INDEX, "")), ("index.json: not JSON",)),
    "index-without-map": Broken(both(shard, text(INDEX, "{}")), ("must have 'weight_map'",)),
    "index-names-a-stranger": Broken(
        shard_index(lambda names: names.update(ghost="model-00001-of-00002.safetensors")),
        ("'ghost' is not in model-00001",),
    ),
    "index-leaves-the-directory": Broken(
        shard_index(lambda names: names.update({EMBEDDING: "../other/model.safetensors"})),
        (
            "'model.embed_tokens.weight' is in '../other/model.safetensors'",
            "must be the name of a .safetensors file",
        ),
    ),
    "index-names-a-pickle": Broken(
        shard_index(lambda names: names.update({EMBEDDING: "pytorch_model.bin"})),
        ("must be the name of a .safetensors",),
    ),
    "tensor-in-two-shards": Broken(
        both(shard, lambda path: _copy_tensor(path, EMBEDDING)), ("model.embed_tokens.weight is in both",)
    ),
}


def _copy_tensor(path: Path, name: str) -> None:
    """Put a tensor into every shard."""
    files = sorted(path.glob("model-*.safetensors"))
    value = next(weights[name] for weights in map(load_file, files) if name in weights)
    for file in files:
        save_file({**load_file(file), name: value}, file, metadata={"format": "pt"})


def make_bases(directory: Path) -> dict[str, Path]:
    """The sound checkpoints that all damage starts from."""
    return {
        "dense": save_random_doge(directory / "dense"),
        "moe": save_random_doge(directory / "moe", **SMALL_MOE),
        "equal-heads": save_random_doge(directory / "equal-heads", num_key_value_heads=4),
    }


def make_broken(name: str, bases: dict[str, Path], directory: Path) -> Path:
    """Make one broken checkpoint in `directory`."""
    broken = BROKEN[name]
    shutil.copytree(bases[broken.base], directory)
    broken.damage(directory)
    return directory


def main(out: Path) -> None:
    """Make all of them below `out`, and print what `doge-deploy export` says about each."""
    from doge_deploy.cli.main import run_command

    bases = make_bases(out / "sound")
    for name in BROKEN:
        path = make_broken(name, bases, out / name)
        print(f"\n{name}", flush=True)
        code = run_command(["export", str(path), "-o", str(out / "bundle")])
        print(f"exit code {code}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
