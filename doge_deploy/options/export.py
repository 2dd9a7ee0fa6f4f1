"""Choices of a user for an export: what is made of a checkpoint.

The words are the section `export` of a file in export_configs/ and the options of `doge-deploy export`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from doge_deploy.dtypes import ShortName
from doge_deploy.options.load import load_options
from doge_deploy.options.words import CacheLayout, Logits, Routing, Task, weight_format_names

_LAYOUT_ORDER = ("static", "growing")


class ExportOptions(BaseModel):
    """What to export. The description of a field says what is legal, and is quoted where a value is not."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    task: Task = Field("causal-lm", description="one of causal-lm, sequence-classification, features")
    dtype: ShortName = Field("fp32", description="one of fp32, fp16, bf16")
    kv_cache: tuple[CacheLayout, ...] = Field(
        ("static",), min_length=1, description="static, growing or a list of both"
    )
    max_length: int | None = Field(
        None, ge=1, description="a whole number >= 1, or null for the checkpoint's own length"
    )
    routing: Routing = Field("reference", description="one of reference, per-token")
    logits: Logits = Field("last", description="one of last, all")
    num_layers: int | None = Field(None, ge=1, description="a whole number >= 1, or null for all layers")
    quantize: str | None = Field(None, description=f"one of {', '.join(weight_format_names())}, or null")
    """The name of a weight format."""
    block_size: int | None = Field(None, ge=1, description="a whole number >= 1, or null for the weight format's own")
    """The format says which sizes it takes."""
    symmetric: bool = Field(True, description="true or false")
    calibrate: bool | None = Field(
        None, description="true, false, or null for what the weight format does in this dtype"
    )
    """Choose numbers by what the model does with a text."""
    inline_functions: bool = Field(False, description="true or false")
    """The standard graphs call no local functions; for runtimes that read none."""

    lower_for: tuple[str, ...] = Field((), description="a list of backends that lower a graph when asked, such as cuda")

    @field_validator("lower_for", mode="before")
    @classmethod
    def _normalise_backends(cls, value: Any) -> Any:
        """One name or any sequence of names, each once."""
        names = (value,) if isinstance(value, str) else value
        return tuple(dict.fromkeys(names)) if isinstance(names, (list, tuple)) else names

    @field_validator("quantize")
    @classmethod
    def _check_format(cls, value: str | None) -> str | None:
        if value is not None and value not in weight_format_names():
            raise ValueError("there is no such weight format")
        return value

    @field_validator("kv_cache", mode="before")
    @classmethod
    def _normalise_layouts(cls, value: Any) -> Any:
        """One name or any sequence of names becomes a tuple in the order of the graphs, each name once."""
        if isinstance(value, str):
            return (value,)
        if isinstance(value, (list, tuple)) and all(name in _LAYOUT_ORDER for name in value):
            return tuple(name for name in _LAYOUT_ORDER if name in value)
        return tuple(value) if isinstance(value, list) else value


def load_export_options(path: Path | None, overrides: Mapping[str, Any], assignments: Sequence[str]) -> ExportOptions:
    """The options of one export, from the section `export` of the file; see `load_options`."""
    return load_options(ExportOptions, "export", path, overrides, assignments)
