"""What a bundle was exported with: the options of an export, nothing left open.

`ExportOptions` is what a user may give; a bundle is read without pydantic, which would take longer to import than the
rest of the manifest's reading.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from doge_deploy.dtypes import ShortName
from doge_deploy.options.words import CacheLayout, Logits, Routing, Task

if TYPE_CHECKING:
    from doge_deploy.options.export import ExportOptions


@dataclass(frozen=True)
class ResolvedOptions:
    """`ExportOptions` of a bundle, field by field."""

    task: Task
    dtype: ShortName
    kv_cache: tuple[CacheLayout, ...]
    """Empty for a task without a cache."""
    max_length: int
    """Most tokens that a row may hold."""
    routing: Routing
    logits: Logits | None
    """None for a task whose outputs are no logits of tokens."""
    num_layers: int | None
    """None for all of the checkpoint's."""
    quantize: str | None
    """The name of a weight format."""
    block_size: int | None
    """Numbers that share a scale; None where weights are not stored in blocks."""
    symmetric: bool
    calibrate: bool | None = None
    """Whether numbers were chosen on a text. None where the format has no choice, and in bundles from before there was
    one, which hold that text or do not.
    """
    inline_functions: bool = False
    """Bundles from before there was a choice have local functions."""

    @classmethod
    def of(cls, options: ExportOptions, *, max_length: int) -> ResolvedOptions:
        """Of a bundle whose rows hold `max_length` tokens; everything else is as in `options`. What graphs were lowered
        for stands with each layout.
        """
        values: dict[str, Any] = {**options.model_dump(exclude={"lower_for"}), "max_length": max_length}
        if options.task != "causal-lm":
            values |= {"kv_cache": (), "logits": None}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {**asdict(self), "kv_cache": list(self.kv_cache)}
