"""Choices of a user for a build: which engine is made of a bundle, for which devices and shapes.

The words are the section `build` of a file in export_configs/ and the options of `doge-deploy build`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from doge_deploy.options.load import load_options

Target = Literal["trt-rtx", "trt"]

_CAPABILITY = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)", re.IGNORECASE)


class Range(BaseModel):
    """Sizes that one axis of an optimization profile allows, and the one that kernels are chosen for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    min: int = Field(ge=1)
    opt: int
    max: int

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError("min <= opt <= max does not hold")
        return self

    def __str__(self) -> str:
        return f"{self.min},{self.opt},{self.max}"


class BuildOptions(BaseModel):
    """What to build. The description of a field says what is legal, and is quoted where a value is not."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    target: Target = Field("trt-rtx", description="one of trt-rtx, trt")
    compute_capabilities: tuple[str, ...] = Field(
        (), description="a list of compute capabilities such as [8.6, 8.9, 12.0]; empty for the target's own default"
    )
    batch_size: Range = Field(
        Range(min=1, opt=1, max=1), description="a whole number >= 1, or three, min <= opt <= max: [1, 1, 8] or 1,1,8"
    )
    sequence_length: Range | None = Field(
        None,
        description="a whole number >= 1, or three, min <= opt <= max: [1, 512, 2048] or 1,512,2048; null for all "
        "lengths that the bundle holds",
    )
    """Tokens of a prefill call; a decode call has one."""
    profiles: Literal["shared", "separate"] | None = Field(
        None, description="shared, separate, or null for the target's own default"
    )
    """One optimization profile for prefill and decode, or one for each."""
    workspace_mib: int | None = Field(None, ge=1, description="a whole number >= 1, or null for no limit")
    strip_weights: bool = Field(False, description="true or false")
    """Leave the weights out of the engine; they are put in from the bundle when it is loaded (refit)."""
    plugins: bool = Field(True, description="true or false")
    """Lower `doge` operators to plugins; only for target trt, which has them."""
    verbosity: Literal["none", "names", "detailed"] = Field("detailed", description="one of none, names, detailed")
    """What the engine says about its layers when it is inspected or profiled."""
    timing_cache: str | None = Field(None, description="a path, or null for none")
    """A file of measured kernel times that is read and brought up to date; only for target trt, which measures."""

    @field_validator("compute_capabilities", mode="before")
    @classmethod
    def _normalise_capabilities(cls, value: Any) -> Any:
        """`8.9`, `"8.9"`, `89`, `"sm89"` -> `"8.9"`; in ascending order, each once."""
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            value = [part for part in str(value).split(",") if part]
        if not isinstance(value, (list, tuple)):
            return value
        found = {parse_capability(str(item)) for item in value}
        return tuple(sorted(found, key=lambda text: tuple(map(int, text.split(".")))))

    @field_validator("batch_size", "sequence_length", mode="before")
    @classmethod
    def _normalise_range(cls, value: Any) -> Any:
        """`8`, `[1, 1, 8]`, `"1,1,8"` and a mapping are all understood. (`1:1:8` is a number to YAML, 3668.)"""
        if isinstance(value, str) and re.fullmatch(r"\d+(,\d+,\d+)?", value):
            value = [int(part) for part in value.split(",")]
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, (list, tuple)) and len(value) in (1, 3):
            return dict(zip(("min", "opt", "max"), list(value) * (3 // len(value)), strict=True))
        return value


def parse_capability(text: str) -> str:
    """`8.9`, `89`, `sm89` or `sm_89` as `8.9`.

    Raises:
        ValueError: it is none of these.
    """
    match = _CAPABILITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a compute capability")
    return f"{match[1]}.{match[2]}"


def load_build_options(path: Path | None, overrides: Mapping[str, Any], assignments: Sequence[str]) -> BuildOptions:
    """The options of one build, from the section `build` of the file; see `load_options`."""
    return load_options(BuildOptions, "build", path, overrides, assignments)
