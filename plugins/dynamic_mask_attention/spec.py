"""Specs of the kernels of doge::DynamicMaskAttention, and their chains.

Symbols: B batch, H query heads, Hkv key/value heads, S score heads (Hkv, in a legacy Doge H), D head_dim, Q new tokens,
K cache slots, W entries of a list, P parts of a row's keys, w keep_window_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.plugins.expressions import Operand, cdiv, minimum, sym
from doge_deploy.plugins.spec import Attribute, Limit, OperatorPlugin, Phase, PluginSpec, Step, TensorSpec
from doge_plugins.dynamic_mask_attention.cost import COSTS
from doge_plugins.dynamic_mask_attention.tiles import combine_tile, decode_tile, prefill_tile, select_tile

PREFILL_ROWS = 64
"""Rows that share a list of keys at prefill. A list is w + 63 entries at most, 3 % more than a row keeps at w = 2048.
The attention kernel's block of rows must divide it.
"""
SPLIT_KEYS = 128
"""Keys of one decode program: 64 KiB of K and V at D 128 in 16 bits, enough loads in flight for one multiprocessor; at
w = 2048 a row makes 16 programs.
"""

B, H, HKV, S, D, Q, K, W, P = (sym(name) for name in ("B", "H", "Hkv", "S", "D", "Q", "K", "W", "P"))
ROWS, WINDOW, SPLIT = sym("rows"), sym("keep_window_size"), sym("split_keys")

_QUERY = TensorSpec("query", "T", (B, H, Q, D), "row q of batch b sits at cache slot first_slot[b] + q")
_KEY = TensorSpec("key", "T", (B, HKV, K, D))
_VALUE = TensorSpec("value", "T", (B, HKV, K, D))
_SCORE = TensorSpec("score", "float32", (B, S, K, 1))
_FIRST_SLOT = TensorSpec("first_slot", "int64", (B,))
# not bool, which TensorRT's plugins do not take
_KEY_MASK = TensorSpec("key_mask", "int32", (B, K), "0 for slots that nobody may see")
_THRESHOLD = TensorSpec(
    "threshold", "float32", (B, S, Q), "score of the row's w-th key; -inf where it sees fewer than w"
)
_LAST_KEPT = TensorSpec("last_kept", "int32", (B, S, Q), "slot of that key: an equal score beyond it is dropped")

_SCALE = Attribute("scale", "float", "multiplies q k^T")
_WINDOW = Attribute("keep_window_size", "int", "w, keys kept per row")
_ROWS = Attribute("rows", "int", "rows that share a list of keys", (1, 16, 32, 64))
_SPLIT = Attribute("split_keys", "int", "keys of one part", (32, 64, 128, 256, 512))

_HEADS = (
    Limit(lambda v: v["H"] % v["Hkv"] == 0, "H a multiple of Hkv"),
    Limit(lambda v: v["S"] % v["Hkv"] == 0 and v["H"] % v["S"] == 0, "S a multiple of Hkv that divides H"),
    Limit(lambda v: v["H"] // v["S"] <= 16, "at most 16 query heads per score head"),
    Limit(lambda v: v["D"] % 8 == 0 and v["D"] <= 256, "D a multiple of 8, at most 256"),
)
_SLOTS = Limit(lambda v: v["K"] < 2**24, "K below 2^24")
_WINDOW_LIMIT = Limit(lambda v: v["keep_window_size"] >= 1, "keep_window_size at least 1")

_ATTENTION_CONSTANTS: dict[str, Operand] = {
    "SCALE": sym("scale"),
    "HEADS": H,
    "KV_HEADS": HKV,
    "SCORE_HEADS": S,
    "HEAD_DIM": D,
}


def _list(rows: Operand) -> tuple[TensorSpec, TensorSpec]:
    blocks = cdiv(Q, rows)
    return (
        TensorSpec("kept", "int32", (B, S, blocks, W), "slots that a row of the block may keep, ascending"),
        TensorSpec("kept_count", "int32", (B, S, blocks), "how many of them there are; the rest of a list is not read"),
    )


def _select(masked: bool) -> PluginSpec:
    kept, kept_count = _list(ROWS)
    width = minimum(K, WINDOW + ROWS - 1)
    return PluginSpec(
        name="DynamicMaskSelect" + ("Masked" if masked else ""),
        doc="for each row the last of its w best visible keys, and for each block of rows the slots any of them keeps",
        inputs=(_SCORE, _FIRST_SLOT, TensorSpec("query", "T", (B, H, Q, D), "only its shape is used"))
        + ((_KEY_MASK,) if masked else ()),
        outputs=(_THRESHOLD, _LAST_KEPT, TensorSpec("kept", "int32", (*kept.shape[:3], width), kept.doc), kept_count),
        attributes=(_WINDOW, _ROWS),
        kernel="doge_plugins.dynamic_mask_attention.kernel:select_" + ("masked_kernel" if masked else "kernel"),
        scalars={"num_rows": Q, "num_slots": K},
        constants={"WINDOW": WINDOW, "ROWS": ROWS},
        static=(),
        grid=(cdiv(Q, ROWS), S, B),
        tiler=select_tile,
        limits=(_SLOTS, _WINDOW_LIMIT),
    )


def _prefill(masked: bool) -> PluginSpec:
    return PluginSpec(
        name="DynamicMaskPrefill" + ("Masked" if masked else ""),
        doc="softmax(q k^T * scale + score) v over all visible keys",
        inputs=(_QUERY, _KEY, _VALUE, _SCORE, _FIRST_SLOT) + ((_KEY_MASK,) if masked else ()),
        outputs=(TensorSpec("output", "T", (B, H, Q, D)),),
        attributes=(_SCALE,),
        kernel="doge_plugins.dynamic_mask_attention.kernel:prefill_" + ("masked_kernel" if masked else "kernel"),
        scalars={"num_rows": Q, "num_slots": K},
        constants=_ATTENTION_CONSTANTS,
        static=("H", "Hkv", "S", "D"),
        grid=(cdiv(Q, sym("BLOCK_ROWS")), S, B),
        tiler=prefill_tile,
        limits=(*_HEADS, _SLOTS),
    )


_PREFILL_SELECTED = PluginSpec(
    name="DynamicMaskPrefillSelected",
    doc="softmax(q k^T * scale + score) v over the keys that each row keeps, read through the list of its block",
    inputs=(_QUERY, _KEY, _VALUE, _SCORE, _FIRST_SLOT, _THRESHOLD, _LAST_KEPT, *_list(ROWS)),
    outputs=(TensorSpec("output", "T", (B, H, Q, D)),),
    attributes=(_SCALE, _ROWS),
    kernel="doge_plugins.dynamic_mask_attention.kernel:prefill_selected_kernel",
    scalars={"num_rows": Q, "num_slots": K, "list_width": W},
    constants={**_ATTENTION_CONSTANTS, "ROWS": ROWS},
    static=("H", "Hkv", "S", "D"),
    grid=(cdiv(Q, sym("BLOCK_ROWS")), S, B),
    tiler=prefill_tile,
    limits=(*_HEADS, _SLOTS),
)


def _parts(number: Operand) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    return (
        TensorSpec("partial", "float32", (B, H, Q, number, D), "sum of exp(logit - maximum) v; not written if empty"),
        TensorSpec("maximum", "float32", (B, H, Q, number), "largest logit of the part; -inf if empty"),
        TensorSpec("total", "float32", (B, H, Q, number), "sum of exp(logit - maximum)"),
    )


def _decode(masked: bool) -> PluginSpec:
    return PluginSpec(
        name="DynamicMaskDecode" + ("Masked" if masked else ""),
        doc="attention over each part of split_keys slots by itself",
        inputs=(_QUERY, _KEY, _VALUE, _SCORE, _FIRST_SLOT) + ((_KEY_MASK,) if masked else ()),
        outputs=_parts(cdiv(K, SPLIT)),
        attributes=(_SCALE, _SPLIT),
        kernel="doge_plugins.dynamic_mask_attention.kernel:decode_" + ("masked_kernel" if masked else "kernel"),
        scalars={"num_rows": Q, "num_slots": K},
        constants={**_ATTENTION_CONSTANTS, "SPLIT_KEYS": SPLIT},
        static=("H", "Hkv", "S", "D"),
        grid=(cdiv(K, SPLIT), Q, B * S),
        tiler=decode_tile,
        limits=(*_HEADS, _SLOTS),
    )


_DECODE_SELECTED = PluginSpec(
    name="DynamicMaskDecodeSelected",
    doc="attention over each part of split_keys entries of the row's list by itself",
    inputs=(_QUERY, _KEY, _VALUE, _SCORE, *_list(1)),
    outputs=_parts(cdiv(W, SPLIT)),
    attributes=(_SCALE, _SPLIT),
    kernel="doge_plugins.dynamic_mask_attention.kernel:decode_selected_kernel",
    scalars={"num_rows": Q, "num_slots": K, "list_width": W},
    constants={**_ATTENTION_CONSTANTS, "SPLIT_KEYS": SPLIT},
    static=("H", "Hkv", "S", "D"),
    grid=(cdiv(W, SPLIT), Q, B * S),
    tiler=decode_tile,
    limits=(*_HEADS, _SLOTS),
)

_COMBINE = PluginSpec(
    name="DynamicMaskCombine",
    doc="sum of exp(maximum) * partial over the parts, divided by the sum of exp(maximum) * total",
    inputs=(*_parts(P), TensorSpec("query", "T", (B, H, Q, D), "only its dtype is used")),
    outputs=(TensorSpec("output", "T", (B, H, Q, D)),),
    attributes=(),
    kernel="doge_plugins.dynamic_mask_attention.kernel:combine_kernel",
    scalars={"num_parts": P},
    constants={"HEAD_DIM": D},
    static=("D",),
    grid=(H, Q, B),
    tiler=combine_tile,
    limits=(_HEADS[-1],),
)

SPECS = (
    _select(False),
    _select(True),
    _prefill(False),
    _prefill(True),
    _PREFILL_SELECTED,
    _decode(False),
    _decode(True),
    _DECODE_SELECTED,
    _COMBINE,
)
_BY_NAME = {spec.name: spec for spec in SPECS}


_PART_NAMES = ("partial", "maximum", "total")


def chain(attributes: Mapping[str, Any], inputs: frozenset[str], phase: Phase) -> tuple[Step, ...]:
    """The nodes that compute one DynamicMaskAttention node.

    Args:
        attributes: `keep_window_size` and `scale` of the node. A window of 0 keeps every key: write 0 too where the
            cache can never hold more than the window, and no select node is made.
        inputs: names of its inputs, with `key_mask` if the node has it.
        phase: "prefill" for engines that take many new tokens at once, "decode" for few; both are exact for any.

    Raises:
        UsageError: an unknown phase.
        UnsupportedModelError: the node has a sliding window. What a row sees does not only grow there, and one list of
            keys for a block of rows rests on that.
    """
    if attributes.get("sliding_window"):
        raise UnsupportedModelError(
            f"sliding_window={attributes['sliding_window']}: DynamicMaskAttention's kernels take no sliding window; "
            "keep the operator's standard body"
        )
    if phase not in ("prefill", "decode"):
        raise UsageError(f"phase={phase!r} must be prefill or decode")
    masked = "key_mask" in inputs
    window, scale = attributes["keep_window_size"], attributes["scale"]
    suffix, mask = ("Masked", ("key_mask",)) if masked else ("", ())
    tensors = ("query", "key", "value", "score")
    steps = []
    if window:
        rows = PREFILL_ROWS if phase == "prefill" else 1
        steps.append(
            Step(
                _BY_NAME["DynamicMaskSelect" + suffix],
                ("score", "first_slot", "query", *mask),
                ("threshold", "last_kept", "kept", "kept_count"),
                {"keep_window_size": window, "rows": rows},
            )
        )
        # the lists hold visible keys only, so what follows needs no mask
        suffix = "Selected"
    if phase == "prefill":
        extra = ("threshold", "last_kept", "kept", "kept_count") if window else mask
        prefill_attributes = {"scale": scale, "rows": PREFILL_ROWS} if window else {"scale": scale}
        name = "DynamicMaskPrefill" + suffix
        steps.append(Step(_BY_NAME[name], (*tensors, "first_slot", *extra), ("output",), prefill_attributes))
        return tuple(steps)
    extra = ("kept", "kept_count") if window else ("first_slot", *mask)
    decode_attributes = {"scale": scale, "split_keys": SPLIT_KEYS}
    name = "DynamicMaskDecode" + suffix
    steps.append(Step(_BY_NAME[name], (*tensors, *extra), _PART_NAMES, decode_attributes))
    steps.append(Step(_BY_NAME["DynamicMaskCombine"], (*_PART_NAMES, "query"), ("output",), {}))
    return tuple(steps)


PLUGIN = OperatorPlugin("DynamicMaskAttention", SPECS, chain, costs=COSTS)
