"""How the matrices of a bundle are stored: one file a format, found by its name.

A file of this package that does not begin with an underscore is a format; it holds a class `Format`. Nothing heavy is
imported here, so that the help of `export` can list them: PyTorch, NumPy and onnx-ir are where numbers are stored.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from doge_deploy.dtypes import ShortName
from doge_deploy.errors import UsageError
from doge_deploy.graph.weight_formats._base import Part, PartSource, Quality, WeightFormat
from doge_deploy.options.words import weight_format_names

if TYPE_CHECKING:
    from doge_deploy.options.export import ExportOptions

__all__ = [
    "Part",
    "PartSource",
    "Quality",
    "WeightFormat",
    "find_weight_format",
    "format_of",
    "resolve_options",
    "weight_formats",
]


def weight_formats() -> dict[str, type[WeightFormat]]:
    """Every format by name, in the order of the names."""
    return {name: find_weight_format(name) for name in weight_format_names()}


def find_weight_format(name: str) -> type[WeightFormat]:
    """The format called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in weight_format_names():
        raise UsageError(f"quantize={name}: must be one of {', '.join(weight_format_names())}")
    found: type[WeightFormat] = importlib.import_module(f"{__name__}.{name}").Format
    return found


class WeightOptions(Protocol):
    """The options of an export, or of a bundle, that say how weights are stored."""

    @property
    def quantize(self) -> str | None: ...
    @property
    def block_size(self) -> int | None: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def calibrate(self) -> bool | None: ...
    @property
    def dtype(self) -> ShortName: ...


def format_of(options: WeightOptions) -> WeightFormat | None:
    """The format that these export options ask for; None where weights have the model's dtype.

    Raises:
        UsageError: there is no such format, or an option has no meaning in it.
    """
    if options.quantize is None:
        return None
    return find_weight_format(options.quantize)(
        block_size=options.block_size, symmetric=options.symmetric, dtype=options.dtype, calibrate=options.calibrate
    )


def resolve_options(options: ExportOptions) -> ExportOptions:
    """The options with the block size that they stand for.

    Raises:
        UsageError: options of the weights do not go together.
    """
    from doge_deploy.options.compatibility import check_quantize

    check_quantize(options)
    chosen = None if options.quantize is None else find_weight_format(options.quantize)
    given = [
        name
        for name in ("block_size", "symmetric")
        if name in options.model_fields_set and getattr(options, name) is not None
    ]
    stored = "no quantize" if chosen is None else f"quantize={chosen.name}"
    if given and (chosen is None or not chosen.block_sizes):
        names = " or ".join(name for name, found in weight_formats().items() if found.block_sizes)
        raise UsageError(
            f"{given[0]}={getattr(options, given[0])!r} with {stored}: only weights in blocks have that; leave it out "
            f"or give quantize={names}"
        )
    if options.calibrate is not None and (chosen is None or chosen.calibrated_dtypes is None):
        names = " or ".join(name for name, found in weight_formats().items() if found.calibrated_dtypes is not None)
        raise UsageError(
            f"calibrate={options.calibrate} with {stored}: only {names} has that choice; leave it out or give "
            f"quantize={names}"
        )
    found = format_of(options)
    return options if found is None else options.model_copy(update={"block_size": found.block_size})
