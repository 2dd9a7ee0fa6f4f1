"""Bytes that one decode step must read from memory, computed from what a bundle stores.

Weights are read once, whatever the batch, in the form in which they are stored: of quantized ones numbers, scales and
the zero points that are not constant. Those that are stored in half precision but computed with in float32 are widened
when they are loaded, and count as float32 unless they are looked up. Of a lookup table only the rows that are looked
up: one embedding row per row of the batch, one row of each RoPE table, the k routed experts. A tied embedding is the
head too, and as that it is read whole. Of the caches what attention needs: every score, and keys and values of the keys
that stay.

This is a floor: what a step writes, activations, and what an implementation reads twice are not in it. With B > 1 the
rows of a batch may choose different experts; only k are counted, since that is what all rows may share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint.names import EMBEDDING
from doge_deploy.config.model import DogeFacts
from doge_deploy.dtypes import item_bytes
from doge_deploy.errors import BrokenBundleError

WEIGHTS_FILE = "weights.safetensors"

_ROPE_TABLES = ("rope_cos", "rope_sin")
_EXPERT_TABLES = (".down_embed.", ".up_embed.")
_SHARED_ZERO_POINTS = "zero_point."
"""Begin the names of zero points of symmetric quantization: constants, which nobody has to read."""


@dataclass(frozen=True)
class Traffic:
    """Bytes per decode step."""

    weight_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes


def decode_traffic(bundle: Bundle, layout: Layout, *, batch_size: int, keys: int) -> Traffic:
    """What a decode step of `batch_size` rows must read, each attending to `keys` keys, its own included."""
    facts = bundle.manifest.facts
    widened = 2 if bundle.manifest.options.quantize == "fp16" else 1
    weights = 0
    for name, rows, nbytes, dtype in stored_tensors(bundle.path / WEIGHTS_FILE):
        read = read_bytes(name, rows, nbytes, facts, batch_size)
        weights += read * widened if dtype == "F16" and read == nbytes else read
    return Traffic(weights, batch_size * _cache_bytes(layout, facts, keys))


def read_bytes(name: str, rows: int, nbytes: int, facts: DogeFacts, batch_size: int) -> int:
    """How much of a stored tensor of `rows` rows and `nbytes` bytes a decode step must read."""
    if name in _ROPE_TABLES:
        return nbytes // rows
    if name.startswith(_SHARED_ZERO_POINTS):
        return 0
    if name.startswith(EMBEDDING) and not facts.tie_word_embeddings:
        return nbytes // rows * min(batch_size, rows)
    if any(table in name for table in _EXPERT_TABLES):
        return nbytes // rows * facts.num_experts_per_tok
    return nbytes


def stored_tensors(path: Path) -> Iterator[tuple[str, int, int, str]]:
    """Name, length of the first axis, bytes and dtype of every tensor of a safetensors file.

    Raises:
        BrokenBundleError: it is not one.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, entry["shape"][0] if entry["shape"] else 1, end - begin, entry["dtype"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenBundleError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _cache_bytes(layout: Layout, facts: DogeFacts, keys: int) -> int:
    """Of one row: all layers and heads."""
    kept = min(keys, facts.keep_window_size) if layout.keep_window else keys
    kinds = {past.name.rsplit(".", 1)[1] for past, _ in layout.signature.past()}
    # Without cached scores every value must be read, because the scores are computed from them.
    columns = {"key": kept, "value": kept if "score" in kinds else keys, "score": keys}
    total = 0
    for past, _ in layout.signature.past():
        kind, (_, heads, _, width) = past.name.rsplit(".", 1)[1], past.shape
        assert isinstance(heads, int) and isinstance(width, int)
        total += heads * width * columns[kind] * item_bytes(past.dtype)
    return total
