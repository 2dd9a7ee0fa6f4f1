"""The fields of the option models as keyword arguments, for type checkers and editors; a test compares the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from doge_deploy.dtypes import ShortName
from doge_deploy.options.build import Range, Target
from doge_deploy.options.words import CacheLayout, Logits, Routing, Task


class ExportKeywords(TypedDict, total=False):
    """Fields of `ExportOptions`, which says what each means and what is legal."""

    task: Task
    dtype: ShortName
    kv_cache: CacheLayout | Sequence[CacheLayout]
    max_length: int | None
    routing: Routing
    logits: Logits
    num_layers: int | None
    quantize: str | None
    block_size: int | None
    symmetric: bool
    calibrate: bool | None
    inline_functions: bool
    lower_for: str | Sequence[str]


class BuildKeywords(TypedDict, total=False):
    """Fields of `BuildOptions`, which says what each means and what is legal."""

    target: Target
    compute_capabilities: Sequence[str]
    batch_size: int | Sequence[int] | Range
    sequence_length: int | Sequence[int] | Range | None
    profiles: Literal["shared", "separate"] | None
    workspace_mib: int | None
    strip_weights: bool
    plugins: bool
    verbosity: Literal["none", "names", "detailed"]
    timing_cache: str | None
