"""Optimization profiles: which sizes of batch and sequence an engine takes."""

from __future__ import annotations

from typing import Literal

from doge_deploy.bundle.engine_record import EngineProfile
from doge_deploy.bundle.signature import BATCH, SEQUENCE
from doge_deploy.errors import UsageError
from doge_deploy.options.build import BuildOptions, Range

_PREFILL_OPT = 512
"""Tokens of the prefill that kernels are chosen for where the user does not say: a short chat turn."""


def make_profiles(
    options: BuildOptions, max_length: int, kind: Literal["shared", "separate"]
) -> tuple[EngineProfile, ...]:
    """The profiles of one engine.

    Args:
        options: batch and sequence ranges as asked for.
        max_length: slots of the cache; no call is longer.
        kind: one profile for prefill and decode, or one for each. Where prefill is one token long there is one anyway.

    Raises:
        UsageError: the ranges do not fit the bundle.
    """
    asked = options.sequence_length or Range(min=1, opt=min(_PREFILL_OPT, max_length), max=max_length)
    if asked.max > max_length:
        raise UsageError(
            f"sequence_length={asked}: a call of {asked.max} tokens does not fit, "
            f"the bundle's max_length is {max_length}"
        )
    one = Range(min=1, opt=1, max=1)
    if asked.max == 1:
        return (_profile("decode", options.batch_size, one),)
    if kind == "shared":
        return (_profile("shared", options.batch_size, Range(min=1, opt=asked.opt, max=asked.max)),)
    return (_profile("prefill", options.batch_size, asked), _profile("decode", options.batch_size, one))


def _profile(name: str, batch: Range, sequence: Range) -> EngineProfile:
    return EngineProfile(name=name, axes={BATCH: batch, SEQUENCE: sequence})
