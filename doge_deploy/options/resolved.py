"""What a bundle was exported with: the options of an export, nothing left open.

The words that options are made of are here too, so that both know the same ones. `ExportOptions` is what a user may
give; a bundle is read without pydantic, which would take longer to import than the rest of the manifest's reading.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from doge_deploy.dtypes import ShortName

if TYPE_CHECKING:
    from doge_deploy.options.export import ExportOptions

Task = Literal["causal-lm", "sequence-classification", "features"]
CacheLayout = Literal["static", "growing"]
Routing = Literal["reference", "per-token"]
Logits = Literal["last", "all"]

_WEIGHT_FORMATS = "doge_deploy.graph.weight_formats"


def weight_format_names() -> tuple[str, ...]:
    """Names of the weight formats: the modules of their package that do not begin with an underscore.

    They are listed, not imported: what they do belongs to the graph, which options do not know.
    """
    spec = importlib.util.find_spec(_WEIGHT_FORMATS)
    assert spec is not None and spec.submodule_search_locations is not None
    found = (module.name for module in pkgutil.iter_modules(list(spec.submodule_search_locations)))
    return tuple(sorted(name for name in found if not name.startswith("_")))


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
