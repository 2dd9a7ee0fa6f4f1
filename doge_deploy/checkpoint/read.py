"""A checkpoint, opened: facts from its config, tensors from its headers, data only when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_deploy.checkpoint.adapter import ADAPTER_CONFIG, Adapter, adapter_alone, open_adapter
from doge_deploy.checkpoint.find import find_adapter, find_checkpoint, model_source
from doge_deploy.checkpoint.headers import TensorInfo, has_weights, lacks_metadata, read_headers, read_json
from doge_deploy.checkpoint.legacy import EARLY, find_revision, legacy_facts, old_name, rename_config, rename_tensors
from doge_deploy.checkpoint.names import EMBEDDING, HEAD, PREFIX, check_tensors, expected_tensors, with_prefix
from doge_deploy.checkpoint.tensors import add_to_digest, read_tensor, stored_bytes
from doge_deploy.checkpoint.wrappers import without_wrappers
from doge_deploy.config.keys import ignored_keys
from doge_deploy.config.model import DogeFacts, check_model_type
from doge_deploy.config.revisions import TRANSFORMERS
from doge_deploy.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

COMPANIONS = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""Files that a bundle takes along where a checkpoint has them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. Opening one reads headers only; `read` reads one tensor at a time."""

    path: Path
    source: str | None
    """The bundled name or Hub id it was opened by; None for a directory."""
    config: Mapping[str, Any]
    """config.json as written, apart from `num_hidden_layers` if fewer layers were asked for, and in transformers' keys
    where a legacy Doge has others."""
    facts: DogeFacts
    tensors: Mapping[str, TensorInfo]
    """The tensors of the model by name: those of `expected_tensors(facts)`, no more and no less. The names are
    transformers' own; each `TensorInfo` has the stored one."""
    generation_config: Mapping[str, Any] | None
    warnings: tuple[str, ...] = ()
    """What was found and is nothing to refuse."""
    adapter: Adapter | None = None
    """Merged into every tensor that is read."""
    as_stored: bool = True
    """transformers reads the same from `path` as `read` does from here."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype, in memory of its own, merged with the adapter where there is one.

        Raises:
            KeyError: the model has no such tensor.
            UnsupportedModelError: the file cannot be read, or was made shorter since it was opened.
        """
        tensor = read_tensor(self.tensors[name])
        change = None if self.adapter is None else self.adapter.changes.get(name)
        return tensor if change is None else change.applied(tensor)

    @cached_property
    def sha256(self) -> str:
        """Identity of the weights, before an adapter: a hash over name, dtype, shape and bytes of every tensor, ordered
        by name.

        How they are spread over files, what a wrapper put before their names, and whether a tied head is stored twice
        does not change it.
        """
        digest = hashlib.sha256()
        untied = self.adapter is not None and self.adapter.unties
        add_to_digest(digest, {name: info for name, info in self.tensors.items() if not (untied and name == HEAD)})
        return digest.hexdigest()

    @property
    def companion_files(self) -> tuple[Path, ...]:
        """Config, generation config and tokenizer files that are there."""
        return tuple(self.path / name for name in COMPANIONS if (self.path / name).is_file())


def open_checkpoint(
    model: str, *, num_layers: int | None = None, adapter: str | None = None, strict: bool = False
) -> Checkpoint:
    """Find a checkpoint and check all of it that can be checked without reading the weights.

    Args:
        model: a bundled name, a directory or a Hub id, see `find_checkpoint`.
        num_layers: take only so many layers, the first ones. The whole checkpoint is checked nevertheless.
        adapter: a directory or Hub id of a PEFT LoRA adapter to merge.
        strict: refuse keys of config.json that transformers ignores.

    Raises:
        UsageError: no such model or adapter, or `num_layers` is not within the model.
        UnsupportedModelError: not a Doge, damaged, of no known revision, or not exportable; names everything found.
        MissingDependencyError: the model is on the Hub, which cannot be reached.
    """
    path = find_checkpoint(model)
    if not has_weights(path) and (alone := adapter_alone(path)):
        raise UnsupportedModelError(alone)
    config_file = path / CONFIG
    config = read_json(config_file)
    check_model_type(config, str(config_file))
    bare = config.get("architectures") == ["DogeModel"]
    stored, wrappers = _unwrapped(config, read_headers(path), model, bare=bare)
    bare = bare and not any(name.startswith(PREFIX) for name in stored)
    if bare:
        stored = with_prefix(stored)
    revision = find_revision(config, stored, model)
    early = revision.name in EARLY
    if early:
        config, stored = rename_config(config, revision, str(config_file)), rename_tensors(stored)
    current = revision.name == TRANSFORMERS
    facts = DogeFacts.from_config(config, str(config_file), strict=strict, refuse_legacy=strict or not current)
    warnings = [f"config.json: {key} is ignored, as transformers ignores it" for key in ignored_keys(config)]
    if not current:
        facts = legacy_facts(facts, config, revision, str(config_file))
    if facts.tie_word_embeddings and HEAD in stored and EMBEDDING not in stored:
        stored[EMBEDDING] = stored[HEAD]  # transformers ties the two whichever is stored
    spell = old_name if early else _without_prefix if bare else str
    check_tensors(stored, facts, model, spell=spell)
    _check_stored_head(stored, facts, model)
    if wrappers:
        warnings.append(f"names of tensors without {', '.join(map(repr, wrappers))}, which a wrapper put into them")
    beside = (path / ADAPTER_CONFIG).exists()
    if beside and adapter is None:
        warnings.append(
            f"{ADAPTER_CONFIG} lies beside the weights: a PEFT adapter, which is not merged (--adapter {model} does)"
        )
    tensors = {name: stored[name] for name in expected_tensors(facts)}
    merged = None
    if adapter is not None:
        merged = _open_adapter(adapter, facts, tensors)
        if merged.unties:
            facts = replace(facts, tie_word_embeddings=False)
            config = {**config, "tie_word_embeddings": False}
            tensors[HEAD] = tensors[EMBEDDING]
            warnings.append("the adapter holds embedding or head of its own: they are two tensors from now on")
    if num_layers is not None:
        facts = _with_layers(facts, num_layers)
        config = {**config, "num_hidden_layers": num_layers}
    return Checkpoint(
        path,
        model_source(model),
        config,
        facts,
        {name: tensors[name] for name in expected_tensors(facts)},
        _read_generation_config(path),
        tuple(warnings),
        merged,
        as_stored=not wrappers and not beside and merged is None and not lacks_metadata(path),
    )


def _unwrapped(
    config: Mapping[str, Any], stored: Mapping[str, TensorInfo], source: str, *, bare: bool
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Tensors without what a wrapper put into their names, in a checkpoint of today's layout."""
    renamed, wrappers = without_wrappers(stored, bare=bare)
    if wrappers:
        named = with_prefix(renamed) if bare else renamed
        if find_revision(config, named, source).name == TRANSFORMERS:
            return renamed, wrappers
    return dict(stored), ()


def _open_adapter(adapter: str, facts: DogeFacts, tensors: Mapping[str, TensorInfo]) -> Adapter:
    if facts.is_legacy:
        raise UnsupportedModelError(f"--adapter {adapter}: peft has no legacy Doge ({facts.revision}) to train one for")
    path = find_adapter(adapter)
    return open_adapter(path, model_source(adapter), facts, {name: info.shape for name, info in tensors.items()})


def _without_prefix(name: str) -> str:
    return name.removeprefix(PREFIX)


def _check_stored_head(stored: Mapping[str, TensorInfo], facts: DogeFacts, source: str) -> None:
    """A tied checkpoint may store its head, as long as it says the same as the embedding."""
    if not facts.tie_word_embeddings or HEAD not in stored:
        return
    head, embedding = stored[HEAD], stored[EMBEDDING]
    same = head.dtype == embedding.dtype and all(
        left == right for left, right in zip(stored_bytes(head), stored_bytes(embedding), strict=True)
    )
    if not same:
        raise UnsupportedModelError(
            f"{source}: tie_word_embeddings=True, but {HEAD} is not {EMBEDDING}: must be equal or absent"
        )


def _with_layers(facts: DogeFacts, num_layers: int) -> DogeFacts:
    if not 1 <= num_layers <= facts.num_hidden_layers:
        raise UsageError(f"num_layers={num_layers}: must be 1 to {facts.num_hidden_layers}, the layers of the model")
    return replace(facts, num_hidden_layers=num_layers)


def _read_generation_config(path: Path) -> dict[str, Any] | None:
    file = path / GENERATION_CONFIG
    return read_json(file) if file.exists() else None
