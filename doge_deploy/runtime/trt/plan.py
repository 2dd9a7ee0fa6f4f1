"""What is bound to an engine's inputs and outputs, and which profile takes a call: all from the engine's record.

Axes: B rows, Q tokens of a call, L slots of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from doge_deploy.bundle.engine_record import EngineRecord, EngineTensor, Interface
from doge_deploy.bundle.signature import BATCH, CACHE_ROWS, SEQUENCE, Signature, bounded
from doge_deploy.devices.tensorrt_limits import TENSORRT_DTYPES
from doge_deploy.dtypes import DTYPES
from doge_deploy.errors import BrokenBundleError, UsageError
from doge_deploy.options.build import Range


@dataclass(frozen=True)
class CacheBuffer:
    """Device memory that is a past input, and a present output too where the engine writes it in place."""

    past: str
    present: str
    tensor: EngineTensor
    kv_heads: int

    def shape(self, batch_size: int) -> tuple[int, ...]:
        """`[B, Hkv, L, D]`, or `[B * Hkv, 1, w, D]`, which are the same bytes where L is w."""
        return _shape(self.tensor, _sizes(batch_size, 0, self.kv_heads))


@dataclass(frozen=True)
class BindingPlan:
    """Every input and output of a network by what it is for."""

    directory: str
    """Of the engine, for messages."""
    record: Interface
    kv_heads: int
    caches: tuple[CacheBuffer, ...]
    inputs: tuple[EngineTensor, ...]
    """Those that are filled anew in every call: `input_ids`, `write_indices`, `sequence_lengths`, RoPE's memory."""
    outputs: tuple[EngineTensor, ...]
    """Those that are read after every call: `logits`, RoPE's memory."""

    def profile(self, batch_size: int, width: int) -> int:
        """Index of the optimization profile for a call of B rows and Q tokens.

        Raises:
            UsageError: no profile takes it.
        """
        reason = self.refusal(batch_size, width)
        if reason is not None:
            raise UsageError(reason)
        index = self.record.profile_for(**{BATCH: batch_size, SEQUENCE: width})
        assert index is not None
        return index

    def refusal(self, batch_size: int, width: int) -> str | None:
        """Why no profile takes a call of B rows and Q tokens, and what would be legal; None: one does."""
        if self.record.profile_for(**{BATCH: batch_size, SEQUENCE: width}) is not None:
            return None
        legal = " or ".join(
            f"{_words(profile.axes[BATCH], 'row')} of {_words(profile.axes[SEQUENCE], 'token')}"
            for profile in self.record.profiles
        )
        return (
            f"{self.directory}: no profile takes {batch_size} rows of {width} tokens; it was built for {legal}: "
            "build it with other --batch-size or --sequence-length"
        )

    def input_shapes(self, batch_size: int, width: int) -> dict[str, tuple[int, ...]]:
        """The shape of every input whose shape is not fixed, caches too."""
        sizes = _sizes(batch_size, width, self.kv_heads)
        tensors = [*self.inputs, *(cache.tensor for cache in self.caches)]
        return {tensor.name: _shape(tensor, sizes) for tensor in tensors if _is_dynamic(tensor)}

    def call_shapes(self, batch_size: int, width: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs that are filled anew, and of the outputs that are read."""
        sizes = _sizes(batch_size, width, self.kv_heads)
        return {tensor.name: _shape(tensor, sizes) for tensor in (*self.inputs, *self.outputs)}

    def cache_bytes(self, batch_size: int) -> int:
        """All caches together."""
        return sum(nbytes(cache.tensor, cache.shape(batch_size)) for cache in self.caches)


def make_plan(record: EngineRecord, signature: Signature) -> BindingPlan:
    """Hold an engine's record against the signature of the layout that it was built from.

    Raises:
        BrokenBundleError: they do not belong together, or the caches are not written in place; all findings are named.
    """
    expected = signature if record.window is None else bounded(signature, record.window, decode=True)
    return plan_of(record.directory, record, expected, kv_heads_of(signature), in_place=True)


def make_prefill_plan(record: EngineRecord, signature: Signature) -> BindingPlan | None:
    """The same for the network that takes calls of more than one token; None where the engine has no such."""
    if record.prefill is None or record.window is None:
        return None
    expected = bounded(signature, record.window, decode=False)
    directory = f"{record.directory} (prefill)"
    return plan_of(directory, record.prefill, expected, kv_heads_of(signature), in_place=False)


def kv_heads_of(signature: Signature) -> int:
    """Of a static layout."""
    past, _ = next(signature.past())
    heads = past.shape[1]
    assert isinstance(heads, int)
    return heads


def plan_of(directory: str, record: Interface, signature: Signature, kv_heads: int, *, in_place: bool) -> BindingPlan:
    """Hold a network against its signature.

    Args:
        directory: of the engine, for messages.
        record: of the network.
        signature: that it must have.
        kv_heads: of the model.
        in_place: present outputs are the past inputs' memory; else they are other memory.

    Raises:
        BrokenBundleError: they do not belong together.
    """
    findings = list(_differences(record.inputs, [spec.name for spec in signature.inputs], "input"))
    findings += _differences(record.outputs, [spec.name for spec in signature.outputs], "output")
    shapes = {spec.name: spec.shape for spec in (*signature.inputs, *signature.outputs)}
    for tensor in (*record.inputs, *record.outputs):
        if tensor.name in shapes and tensor.shape != shapes[tensor.name]:
            findings.append(f"{tensor.name} is {list(tensor.shape)}, the graph's {list(shapes[tensor.name])}")
        if tensor.dtype not in TENSORRT_DTYPES:
            findings.append(f"{tensor.name} is {tensor.dtype}, must be one of {', '.join(TENSORRT_DTYPES)}")
    pairs = [(past.name, present.name) for past, present in signature.past()]
    expected = {present: past for past, present in pairs} if in_place else {}
    found = {present: record.aliases.get(present) for _, present in pairs}
    findings += [
        f"{present} is {'not ' * in_place}written in place of {past}"
        for past, present in pairs
        if found[present] != expected.get(present)
    ]
    if findings:
        raise BrokenBundleError(f"{directory}: {'; '.join(findings)}; build it again")
    cached = {name for pair in pairs for name in pair}
    return BindingPlan(
        directory=directory,
        record=record,
        kv_heads=kv_heads,
        caches=tuple(CacheBuffer(past, present, record.tensor(past), kv_heads) for past, present in pairs),
        inputs=tuple(tensor for tensor in record.inputs if tensor.name not in cached),
        outputs=tuple(tensor for tensor in record.outputs if tensor.name not in cached),
    )


def nbytes(tensor: EngineTensor, shape: tuple[int, ...]) -> int:
    """Bytes of the tensor at that shape."""
    return DTYPES[tensor.dtype].nbytes(math.prod(shape))


def _differences(found: tuple[EngineTensor, ...], expected: list[str], what: str) -> list[str]:
    names = [tensor.name for tensor in found]
    return [f"no {what} {name}" for name in expected if name not in names] + [
        f"unknown {what} {name}" for name in names if name not in expected
    ]


def _sizes(batch_size: int, width: int, kv_heads: int) -> dict[str, int]:
    return {BATCH: batch_size, SEQUENCE: width, CACHE_ROWS: batch_size * kv_heads}


def _is_dynamic(tensor: EngineTensor) -> bool:
    return any(isinstance(axis, str) for axis in tensor.shape)


def _shape(tensor: EngineTensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)


def _words(sizes: Range, what: str) -> str:
    if sizes.min == sizes.max:
        return f"{sizes.max} {what}{'s' if sizes.max > 1 else ''}"
    return f"{sizes.min} to {sizes.max} {what}s"
