"""Checkpoints of the original SmallDoge code, which transformers cannot load or express.

They size `A` and `dt_proj` by query heads and do not normalise queries and keys. Until mid-2025 their parameters and
config keys had other names as well, and no key was ever dropped. Nothing in a checkpoint names its revision: it is
found from names and shapes, and where they do not agree with each other the checkpoint is refused.
Reference: repository SmallDoges/small-doge, revisions 42e5a63, efdbaaa, bb82960 and 0e305a7.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from doge_deploy.checkpoint.headers import TensorInfo
from doge_deploy.config.keys import is_integer, is_number, legacy_keys
from doge_deploy.config.model import ARCHITECTURE, DogeFacts
from doge_deploy.config.revisions import KEEPS_ALL, REVISIONS, TRANSFORMERS, Revision
from doge_deploy.diagnostics import join_findings
from doge_deploy.errors import UnsupportedModelError

EARLY = ("2025-02", "2025-03")
"""Revisions whose tensors and config keys had other names."""

_A = re.compile(r"model\.layers\.\d+\.self_attn\.A")
_DT_PROJ = re.compile(r"model\.layers\.\d+\.self_attn\.dt_proj\.(weight|bias)")
_NORM = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_norm\.weight")

# Names of early 2025 and what they became; each old one starts or ends where a dot or the name does.
_RENAMED = {
    "model.word_embed.": "model.embed_tokens.",
    "model.final_layernorm.": "model.norm.",
    ".pre_layernorm.": ".input_layernorm.",
    ".pre_residual.weight": ".input_residual",
    ".post_layernorm.": ".post_attention_layernorm.",
    ".post_residual.weight": ".post_attention_residual",
    ".feed_forward.": ".mlp.",
}

_OLD_DEFAULTS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
"""What the early config classes filled in for absent keys, where transformers' fills in something else."""

_EXACT_ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
"""Computed alike by every transformers that the original code ran on, and by today's."""


def new_name(name: str) -> str:
    """A tensor's name in transformers, for a name of early 2025; any other name as it is."""
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def old_name(name: str) -> str:
    """The inverse of `new_name`."""
    for old, new in _RENAMED.items():
        name = name.replace(new, old) if new.endswith(".") else re.sub(re.escape(new) + "$", old, name)
    return name


@dataclass(frozen=True)
class _Marks:
    """What is there to tell a revision by: names of tensors, each list in the order of the checkpoint."""

    old_names: list[str]
    new_names: list[str]
    norms: list[str]
    query_sized: list[str]
    kv_sized: list[str]
    other_sized: list[str]
    heads_differ: bool
    """Query and key/value heads are of different number, so that shapes tell."""

    def findings(self, tensors: Mapping[str, TensorInfo]) -> list[str]:
        """What was found, with the revision that it speaks for."""

        def shapes(names: list[str]) -> str:
            return ", ".join(f"{name} {list(tensors[name].shape)}" for name in names[:2]) + _rest(names, 2)

        found = []
        if self.old_names:
            found.append(f"{', '.join(self.old_names[:3])}{_rest(self.old_names, 3)}: names of early 2025")
        if self.new_names and self.old_names:
            found.append(f"{', '.join(self.new_names[:3])}{_rest(self.new_names, 3)}: names of mid-2025 and later")
        if self.norms:
            found.append(f"{', '.join(self.norms[:2])}{_rest(self.norms, 2)}: as in transformers")
        else:
            found.append("no self_attn.q_norm, no self_attn.k_norm: legacy")
        if self.query_sized:
            found.append(f"{shapes(self.query_sized)} sized by num_attention_heads: legacy")
        if self.kv_sized:
            found.append(f"{shapes(self.kv_sized)} sized by num_key_value_heads: as in transformers")
        if self.other_sized:
            found.append(f"{shapes(self.other_sized)} sized by neither number of heads")
        return found


def _rest(names: list[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def find_revision(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], source: str) -> Revision:
    """Which revision wrote a checkpoint.

    Args:
        config: config.json as written.
        tensors: what is stored, by stored name.
        source: what to call the checkpoint in a message.

    Raises:
        UnsupportedModelError: the marks contradict each other; the message lists them.
    """
    # `A` is in every Doge of any age and in no other model; what lacks it is refused by what transformers' layout needs
    if not any(_A.fullmatch(name) for name in tensors):
        return REVISIONS[TRANSFORMERS]
    marks = _find_marks(config, tensors)
    if marks.norms and not marks.old_names and not marks.query_sized:
        return REVISIONS[TRANSFORMERS]
    names_agree = not (marks.old_names and marks.new_names)
    shapes_agree = bool(marks.query_sized) and not marks.kv_sized and not marks.other_sized
    if marks.norms or not names_agree or (marks.heads_differ and not shapes_agree):
        raise _ambiguous(source, marks.findings(tensors))
    if not marks.old_names:
        return REVISIONS["2025-08"]
    return _early_revision(config, marks, tensors, source)


def _early_revision(
    config: Mapping[str, Any], marks: _Marks, tensors: Mapping[str, TensorInfo], source: str
) -> Revision:
    """February and March 2025 had the same tensors: their config keys differ."""
    february = [key for key in config if key.startswith("num_cdmoe_")]
    march = [key for key in ("keep_window_size", "num_experts", "num_experts_per_tok") if key in config]
    unknown = [key for key in config if key.startswith("num_cdmmoe_") or key == "private_expert_intermediate_size"]
    if unknown:
        keys = ", ".join(f"{key}={config[key]!r}" for key in unknown)
        raise UnsupportedModelError(
            f"{source}: legacy Doge from before February 2025, another architecture, not supported: config keys {keys}"
        )
    if bool(february) == bool(march):
        found = [f"config keys {', '.join(february)}: February 2025"] if february else ["no config key num_cdmoe_*"]
        found += [f"config keys {', '.join(march)}: March 2025"] if march else ["no config key keep_window_size"]
        raise _ambiguous(source, [*marks.findings(tensors), *found])
    return REVISIONS["2025-02" if february else "2025-03"]


def _ambiguous(source: str, findings: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source}: neither transformers' layout nor a legacy Doge layout, but something of both: "
        f"{join_findings(findings)}"
    )


def _find_marks(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> _Marks:
    renamed = {name for name in tensors if new_name(name) != name}
    heads = config.get("num_attention_heads", 8)
    kv_heads = config.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else kv_heads
    differ = is_integer(heads) and is_integer(kv_heads) and heads != kv_heads
    sized = [name for name in tensors if _A.fullmatch(name) or _DT_PROJ.fullmatch(name)] if differ else []

    def of_size(size: Any) -> list[str]:
        return [name for name in sized if tensors[name].shape[:1] == (size,)]

    query_sized, kv_sized = of_size(heads), of_size(kv_heads)
    return _Marks(
        old_names=[name for name in tensors if name in renamed],
        new_names=[name for name in tensors if old_name(name) != name],
        norms=[name for name in tensors if _NORM.fullmatch(name)],
        query_sized=query_sized,
        kv_sized=kv_sized,
        other_sized=[name for name in sized if name not in query_sized and name not in kv_sized],
        heads_differ=differ,
    )


def rename_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors of early 2025 by the names that transformers gives them; each still knows its stored name."""
    return {new_name(name): info for name, info in tensors.items()}


def rename_config(config: Mapping[str, Any], revision: Revision, source: str) -> dict[str, Any]:
    """config.json of February or March 2025 in transformers' keys.

    Args:
        config: as written.
        revision: "2025-02" or "2025-03".
        source: what to call the file in a message.

    Raises:
        UnsupportedModelError: a value asks for what cannot be exported exactly; names all of them.
    """
    findings = []
    ratio = config.get("dynamic_mask_ratio", 0.0)
    if not (is_number(ratio) and ratio == 0):
        findings.append(
            f"dynamic_mask_ratio={ratio!r}: keys chosen over later tokens too are not supported; must be 0.0"
        )
    if config.get("is_moe", False) is not False:
        keys = [key for key in config if key.startswith(("num_cdmoe_", "num_experts", "expert_retrieval"))]
        values = ", ".join(f"{key}={config[key]!r}" for key in keys)
        findings.append(f"is_moe={config['is_moe']!r} with {values}: the mixture of early 2025 is not supported")
    for key in ("attention_bias", "mlp_bias", "sliding_window", "norm_topk_prob"):
        if config.get(key):
            findings.append(f"{key}={config[key]!r}: the code of {revision.name} has no such key")
    bias = config.get("hidden_bias", False)
    if not isinstance(bias, bool):
        findings.append(f"hidden_bias={bias!r}: must be true or false")
    if "keep_window_size" in config and not (
        is_integer(config["keep_window_size"]) and config["keep_window_size"] >= 1
    ):
        findings.append(f"keep_window_size={config['keep_window_size']!r}: must be a whole number >= 1")
    if findings:
        raise UnsupportedModelError(f"{source}: legacy Doge of {revision.name}: {join_findings(findings)}")
    dropped = {*legacy_keys(config), "num_experts", "num_experts_per_tok"}
    kept = {key: value for key, value in config.items() if key not in dropped}
    # with ratio 0.0 no key is dropped, however many there are
    return {**_OLD_DEFAULTS, **kept, "attention_bias": bias, "mlp_bias": bias, "keep_window_size": KEEPS_ALL}


def legacy_facts(facts: DogeFacts, config: Mapping[str, Any], revision: Revision, source: str) -> DogeFacts:
    """The facts of a legacy checkpoint, for those that `config`, in transformers' keys, gives.

    Raises:
        UnsupportedModelError: a value has a meaning that the original code did not share; names all of them.
    """
    findings = []
    if facts.rope_type not in _EXACT_ROPE_TYPES:
        findings.append(
            f"rope_type={facts.rope_type!r}: differs between the transformers of then and now; "
            f"must be one of {', '.join(_EXACT_ROPE_TYPES)}"
        )
    if facts.hidden_act == "xielu":
        findings.append("hidden_act='xielu': came with transformers 4.56, after the code of any legacy Doge")
    if config.get("sliding_window") is not None:
        findings.append(f"sliding_window={config['sliding_window']!r}: not supported in a legacy Doge; must be null")
    if config.get("architectures") not in (None, [ARCHITECTURE]):
        findings.append(
            f"architectures={config['architectures']!r}: not supported in a legacy Doge; must be ['{ARCHITECTURE}']"
        )
    if findings:
        raise UnsupportedModelError(f"{source}: legacy Doge of {revision.name}: {join_findings(findings)}")
    return replace(facts, revision=revision.name)
