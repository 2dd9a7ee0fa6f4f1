"""A checkpoint, opened: facts from its config, tensors from its headers, data only when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_deploy.checkpoint.find import find_checkpoint, model_source
from doge_deploy.checkpoint.headers import TensorInfo, read_headers, read_json
from doge_deploy.checkpoint.legacy import EARLY, find_revision, legacy_facts, old_name, rename_config, rename_tensors
from doge_deploy.checkpoint.names import EMBEDDING, HEAD, PREFIX, check_tensors, expected_tensors, with_prefix
from doge_deploy.config.model import DogeFacts, check_model_type
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

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. Opening one reads headers only; `read` maps one tensor at a time."""

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

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype, backed by a memory map of its file.

        Raises:
            KeyError: the model has no such tensor.
            UnsupportedModelError: the file was changed since it was opened.
        """
        from safetensors import SafetensorError, safe_open

        info = self.tensors[name]
        file = info.file
        try:
            with safe_open(file, framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(info.name)
        except (OSError, SafetensorError) as error:
            raise UnsupportedModelError(f"{file}: {name} cannot be read: {' '.join(str(error).split())}") from error
        return tensor

    @cached_property
    def sha256(self) -> str:
        """Identity of the weights: a hash over name, dtype, shape and bytes of every tensor, ordered by name.

        How they are spread over files, and whether a tied head is stored twice, does not change it.
        """
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name}\0{info.dtype}\0{','.join(map(str, info.shape))}\0".encode())
            for chunk in stored_bytes(info):
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def companion_files(self) -> tuple[Path, ...]:
        """Config, generation config and tokenizer files that are there."""
        return tuple(self.path / name for name in COMPANIONS if (self.path / name).is_file())


def stored_bytes(info: TensorInfo) -> Iterator[bytes]:
    """The stored bytes of a tensor, a chunk at a time.

    Raises:
        UnsupportedModelError: the file ends early.
    """
    with info.file.open("rb") as file:
        file.seek(info.offset)
        left = info.nbytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise UnsupportedModelError(f"{info.file}: truncated: {info.name} lacks its last {left} bytes")
            left -= len(chunk)
            yield chunk


def open_checkpoint(model: str, *, num_layers: int | None = None) -> Checkpoint:
    """Find a checkpoint and check all of it that can be checked without reading the weights.

    Args:
        model: a bundled name, a directory or a Hub id, see `find_checkpoint`.
        num_layers: take only so many layers, the first ones. The whole checkpoint is checked nevertheless.

    Raises:
        UsageError: no such model, or `num_layers` is not within the model.
        UnsupportedModelError: not a Doge, damaged, of no known revision, or not exportable; names everything found.
        MissingDependencyError: the model is on the Hub, which cannot be reached.
    """
    path = find_checkpoint(model)
    config_file = path / CONFIG
    config = read_json(config_file)
    check_model_type(config, str(config_file))
    stored = read_headers(path)
    bare = config.get("architectures") == ["DogeModel"] and not any(name.startswith(PREFIX) for name in stored)
    if bare:
        stored = with_prefix(stored)
    revision = find_revision(config, stored, model)
    early = revision.name in EARLY
    if early:
        config, stored = rename_config(config, revision, str(config_file)), rename_tensors(stored)
    facts = DogeFacts.from_config(config, str(config_file))
    if revision.name != facts.revision:
        facts = legacy_facts(facts, config, revision, str(config_file))
    spell = old_name if early else _without_prefix if bare else str
    check_tensors(stored, facts, model, spell=spell)
    _check_stored_head(stored, facts, model)
    if num_layers is not None:
        facts = _with_layers(facts, num_layers)
        config = {**config, "num_hidden_layers": num_layers}
    tensors = {name: stored[name] for name in expected_tensors(facts)}
    return Checkpoint(path, model_source(model), config, facts, tensors, _read_generation_config(path))


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
