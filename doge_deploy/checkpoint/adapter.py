"""A PEFT LoRA adapter, merged into the tensors of its base as peft's `merge_and_unload` does it, one tensor at a time.

A low-rank pair adds `B @ A * scaling` to a weight; a tensor that the adapter stores whole takes the place of the one of
the base. The products are those of peft, operation by operation, so that the sums are equal to the bit where the same
PyTorch computes them.
Reference: `LoraLayer` and `get_delta_weight` in peft's tuners/lora/layer.py, `check_target_module_exists` in
tuners/tuners_utils.py, `get_pattern_key` in utils/other.py (peft 0.21).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_deploy.checkpoint.headers import TensorInfo, read_header, read_json
from doge_deploy.checkpoint.names import EMBEDDING, HEAD, PREFIX
from doge_deploy.checkpoint.tensors import add_to_digest, read_tensor
from doge_deploy.config.keys import is_integer, is_number
from doge_deploy.config.model import DogeFacts
from doge_deploy.diagnostics import join_findings
from doge_deploy.dtypes import FLOATS
from doge_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_READ = frozenset(
    """
    peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform
    layers_pattern modules_to_save bias lora_bias fan_in_fan_out init_lora_weights task_type ensure_weight_tying
    """.split()
)
"""Keys of adapter_config.json whose value is read here."""

_INERT = frozenset(
    """
    auto_mapping base_model_name_or_path revision inference_mode lora_dropout peft_version runtime_config
    megatron_core qalora_group_size loftq_config parent_library corda_config eva_config lora_ga_config
    """.split()
)
"""Keys that change nothing of a merge. The configs of initialisations matter with `init_lora_weights` alone."""

_SOUND_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base as it is; the others change it before training."""

_LINEAR = re.compile(
    r"(lm_head|score|model\.layers\.\d+\.(self_attn\.(q|k|v|dt|o)_proj|mlp\.(gate_proj|up_proj|down_proj|router_gate)))"
)
_EMBEDDING = re.compile(r"model\.(embed_tokens|layers\.\d+\.mlp\.(down_embed|up_embed))")

_PAIRS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """What is added to a tensor: `B @ A`, of an embedding transposed, or a bias; each times `scaling`."""

    b: TensorInfo
    a: TensorInfo | None
    """`[r, columns]`, with `b` `[rows, r]`; None where `b` is a bias itself."""
    scaling: float
    of_embedding: bool = False

    def added_to(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum, in the dtype of `tensor`, which stays as it is."""
        merged = tensor.clone()
        # peft holds adapters in float32, whatever they are stored as
        b = read_tensor(self.b).float()
        if self.a is None:
            merged += b * self.scaling
            return merged
        product = b @ read_tensor(self.a).float()
        if self.of_embedding:
            merged += (product.T * self.scaling).to(tensor.dtype)
        else:
            merged += product * self.scaling
        return merged


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor of the base: first replaced, then added to."""

    replaced: TensorInfo | None = None
    low_rank: LowRank | None = None

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        """The merged tensor, in the dtype of the base's."""
        if self.replaced is not None:
            tensor = read_tensor(self.replaced).to(tensor.dtype)
        return tensor if self.low_rank is None else self.low_rank.added_to(tensor)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter; its tensors are read when they are asked for."""

    path: Path
    source: str | None
    """The Hub id it was opened by; None for a directory."""
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    changes: Mapping[str, Change]
    """By the name of the base's tensor."""
    unties: bool
    """Embedding and head are two tensors after the merge, though the base has one for both."""

    @cached_property
    def sha256(self) -> str:
        """Identity: a hash over the settings that decide about the merge, and over every tensor as in `Checkpoint`."""
        digest = hashlib.sha256()
        settings = {key: value for key, value in self.config.items() if key in _READ}
        digest.update(json.dumps(settings, sort_keys=True).encode())
        add_to_digest(digest, self.tensors)
        return digest.hexdigest()


def open_adapter(path: Path, source: str | None, facts: DogeFacts, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Check an adapter against the base that it is to be merged into; no data is read.

    Args:
        path: the directory with adapter_config.json and adapter_model.safetensors.
        source: how anyone else may name it; None for a directory.
        facts: of the base.
        shapes: name and shape of every tensor of the base.

    Raises:
        UnsupportedModelError: not a LoRA adapter, damaged, of another model, or of a kind that is not merged here.
    """
    config = read_json(path / ADAPTER_CONFIG)
    _check_kind(config, path / ADAPTER_CONFIG)
    if not (path / ADAPTER_WEIGHTS).exists():
        pickled = (
            "; adapter_model.bin is a pickle, which is never loaded" if (path / "adapter_model.bin").exists() else ""
        )
        raise UnsupportedModelError(f"{path}: no {ADAPTER_WEIGHTS}{pickled}")
    tensors = read_header(path / ADAPTER_WEIGHTS)
    merge = _Merge(config, facts, shapes)
    changes = merge.changes(tensors)
    if merge.findings:
        raise UnsupportedModelError(f"{path}: the adapter does not fit the base: {join_findings(merge.findings)}")
    return Adapter(path, source, config, tensors, changes, merge.unties(changes))


def adapter_alone(path: Path) -> str:
    """What to say of a folder that holds an adapter and no model; empty where that is not so."""
    if not (path / ADAPTER_CONFIG).exists():
        return ""
    base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path") or "the model that it was trained on"
    return f"{path} holds a PEFT adapter and no model: give its base, {base}, as MODEL, and merge with --adapter {path}"


def _check_kind(config: Mapping[str, Any], file: Path) -> None:
    findings = []
    if config.get("peft_type") != "LORA":
        raise UnsupportedModelError(f"{file}: peft_type={config.get('peft_type')!r}: must be 'LORA'")
    if config.get("use_dora"):
        findings.append("use_dora=True: DoRA is not merged here")
    start = config.get("init_lora_weights", True)
    if start not in _SOUND_STARTS:
        findings.append(
            f"init_lora_weights={start!r}: the base was changed before training; convert it with peft's "
            "path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        # an option of a kind of LoRA that is not known here is off where it is empty
        if key not in _READ | _INERT | {"use_dora"} and value not in (None, False, {}, [], ""):
            findings.append(f"{key}={value!r}: not merged here")
    if not (is_integer(config.get("r", 8)) and config.get("r", 8) >= 1):
        findings.append(f"r={config['r']!r}: must be a whole number >= 1")
    if not is_number(config.get("lora_alpha", 8)):
        findings.append(f"lora_alpha={config['lora_alpha']!r}: must be a number")
    for key, legal in (("rank_pattern", is_integer), ("alpha_pattern", is_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(legal(value) for value in pattern.values()):
            findings.append(f"{key}={pattern!r}: must be an object of names and numbers")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(key)
        texts = value is None or isinstance(value, str) or _texts(value)
        if not texts or (key == "modules_to_save" and isinstance(value, str)):
            findings.append(f"{key}={value!r}: must be a list of names")
    if config.get("target_modules") is None:
        findings.append("target_modules is missing: must be a list of names, a regular expression or 'all-linear'")
    layers = config.get("layers_to_transform")
    if (
        layers is not None
        and not is_integer(layers)
        and not (isinstance(layers, list) and all(map(is_integer, layers)))
    ):
        findings.append(f"layers_to_transform={layers!r}: must be whole numbers")
    for pattern in _patterns(config):
        try:
            re.compile(pattern)
        except re.error as error:
            findings.append(f"{pattern!r} is no regular expression: {error}")
    if findings:
        raise UnsupportedModelError(f"{file}: {join_findings(findings)}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _patterns(config: Mapping[str, Any]) -> Iterable[str]:
    """Everything in an adapter_config.json that is read as a regular expression."""
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(config.get(key), str):
            yield config[key]
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(key), dict):
            yield from config[key]
    for key in ("modules_to_save", "layers_pattern"):
        if _texts(config.get(key)):
            yield from config[key]


class _Merge:
    """Which tensor of an adapter changes which of the base; what does not fit is a finding.

    Modules have their names in the base model itself: those of the tensors, but without `model.` where that is the
    decoder alone.
    """

    def __init__(self, config: Mapping[str, Any], facts: DogeFacts, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.config = config
        self.shapes = dict(shapes)
        self.tied = facts.tie_word_embeddings
        if self.tied and EMBEDDING in shapes:
            self.shapes[HEAD] = shapes[EMBEDDING]
        self.bare = facts.architecture == "DogeModel"
        self.findings: list[str] = []
        self.saved = list(config.get("modules_to_save") or ())

    def changes(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Change]:
        pairs: dict[str, dict[str, TensorInfo]] = {}
        replaced: dict[str, TensorInfo] = {}
        for stored, info in tensors.items():
            name = stored.removeprefix("base_model.model.")
            if info.dtype not in FLOATS:
                self.findings.append(f"{stored} is {info.dtype}: must be one of {', '.join(FLOATS)}")
            suffix = next((suffix for suffix in _PAIRS if name.endswith(suffix)), None)
            if suffix is None:
                self._replace(stored, name.replace(".base_layer.", "."), info, replaced)
            else:
                pairs.setdefault(self._name(name.removesuffix(suffix)), {})[suffix] = info
        if self.tied and HEAD in replaced and not self._is_saved("lm_head"):
            self.findings.append(f"{HEAD} is stored, but is no module to save, and the base's head is its embedding")
        found = {name: Change(replaced=info) for name, info in replaced.items()}
        for module in sorted(pairs.keys() | self._targets()):
            self._add(module, pairs.get(module, {}), found)
        for module in self._saved_modules():
            if not any(name.startswith(f"{module}.") for name in replaced):
                self.findings.append(f"modules_to_save names {self._spell(module)}, of which no tensor is stored")
        return found

    def unties(self, changes: Mapping[str, Change]) -> bool:
        """Whether peft's merge would leave embedding and head of a tied base apart."""
        ends = [EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")]
        return self.tied and any(f"{end}.weight" in changes and self._is_saved(end) for end in ends)

    def _name(self, name: str) -> str:
        return PREFIX + name if self.bare else name

    def _spell(self, module: str) -> str:
        """A module's name as the base model itself has it, which is what patterns are matched against."""
        return module.removeprefix(PREFIX) if self.bare else module

    def _modules(self) -> list[str]:
        """Modules that a low-rank pair may be added to."""
        names = [name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight")]
        return [name for name in names if _LINEAR.fullmatch(name) or _EMBEDDING.fullmatch(name)]

    def _is_saved(self, module: str) -> bool:
        return any(re.match(rf"(^|.*\.){name}($|\..*)", self._spell(module)) for name in self.saved)

    def _saved_modules(self) -> list[str]:
        return [module for module in self._modules() if self._is_saved(module)]

    def _targets(self) -> set[str]:
        """Modules that the config adds a pair to."""
        return {module for module in self._modules() if self._is_target(module)}

    def _is_target(self, module: str) -> bool:
        key, config = self._spell(module), self.config
        excluded, targets = config.get("exclude_modules"), config["target_modules"]
        if excluded and _matches(excluded, key):
            return False
        if self._is_saved(module):
            return False
        if isinstance(targets, str) and targets.lower() == "all-linear":
            head = ["lm_head"] if not self.bare else []
            head += ["score"] if config.get("task_type") == "SEQ_CLS" else []
            return bool(_LINEAR.fullmatch(module)) and module not in head
        if not _matches(targets, key):
            return False
        return isinstance(targets, str) or key in targets or self._in_layers(key)

    def _in_layers(self, key: str) -> bool:
        layers, pattern = self.config.get("layers_to_transform"), self.config.get("layers_pattern")
        if layers is None or layers == []:
            return True
        patterns = [pattern] if isinstance(pattern, str) and pattern else pattern or []
        found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", key) if not patterns else None
        for one in patterns:
            found = found or re.match(rf"(?:^|.*?\.){one}\.(?P<index>\d+)\.", key)
        if found is None:
            return False
        return int(found["index"]) in (layers if isinstance(layers, list) else [layers])

    def _replace(self, stored: str, name: str, info: TensorInfo, replaced: dict[str, TensorInfo]) -> None:
        name = self._name(name)
        if name not in self.shapes:
            self.findings.append(f"{stored} is no tensor of the base")
        elif info.shape != self.shapes[name]:
            self.findings.append(f"{stored} is {list(info.shape)}, the base's is {list(self.shapes[name])}")
        else:
            replaced[name] = info

    def _add(self, module: str, pair: Mapping[str, TensorInfo], found: dict[str, Change]) -> None:
        """The pair of one module into `found`; an empty one where none is stored."""
        key = self._spell(module)
        if not pair:
            self.findings.append(f"{key} is a target, but no pair is stored for it")
            return
        if module not in self._targets():
            self.findings.append(f"{key} has a pair, but is no target of adapter_config.json")
            return
        if self.tied and f"{module}.weight" in (EMBEDDING, HEAD):
            self.findings.append(
                f"{key} has a pair, and the base's embedding is its head too: peft's merge would change both; untie "
                "them first"
            )
            return
        weight = f"{module}.weight"
        embedding = _EMBEDDING.fullmatch(module) is not None
        parts = {part: pair[suffix] for suffix, part in _PAIRS.items() if suffix in pair}
        kind = {suffix for suffix in pair if suffix.startswith(".lora_embedding")}
        if parts.keys() - {"bias"} != {"A", "B"} or bool(kind) != embedding:
            self.findings.append(f"{key} has {', '.join(sorted(pair))}: must be a pair of A and B")
            return
        rank = self._pattern("rank_pattern", module, self.config.get("r", 8))
        rows, columns = self.shapes[weight] if not embedding else self.shapes[weight][::-1]
        a, b = parts["A"], parts["B"]
        if (b.shape, a.shape) != ((rows, rank), (rank, columns)):
            self.findings.append(
                f"{key}: A {list(a.shape)} and B {list(b.shape)}, must be {[rank, columns]} and {[rows, rank]}"
            )
            return
        alpha = self._pattern("alpha_pattern", module, self.config.get("lora_alpha", 8))
        scaling = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        earlier = found.get(weight, Change())
        found[weight] = Change(earlier.replaced, LowRank(b, a, scaling, embedding))
        if "bias" in parts:
            bias = f"{module}.bias"
            if parts["bias"].shape != self.shapes.get(bias):
                self.findings.append(f"{key} has a bias in its pair, which the base cannot take")
                return
            earlier = found.get(bias, Change())
            found[bias] = Change(earlier.replaced, LowRank(parts["bias"], None, scaling))

    def _pattern(self, name: str, module: str, default: Any) -> Any:
        """The value of the first pattern that a module's name ends with."""
        patterns: Mapping[str, Any] = self.config.get(name) or {}
        key = self._spell(module)
        return next((value for one, value in patterns.items() if re.match(rf"(.*\.)?({one})$", key)), default)


def _matches(names: str | Sequence[str], key: str) -> bool:
    """A regular expression for the whole name, or the last parts of it."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names)
