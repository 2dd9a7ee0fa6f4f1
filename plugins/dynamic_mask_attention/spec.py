"""Specs of the kernels of doge::DynamicMaskAttention, and their chains.

Symbols: B batch, H query heads, Hkv key/value heads, S score heads (Hkv, in a legacy Doge H), D head_dim, Q new tokens,
K cache slots, W entries of a list, P parts of the keys, w keep_window_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.kernels.expressions import Operand, cdiv, minimum, sym
from doge_deploy.kernels.spec import Attribute, Limit, OperatorPlugin, PluginSpec, Step, TensorSpec
from doge_plugins.dynamic_mask_attention.cost import COSTS
from doge_plugins.dynamic_mask_attention.tiles import attend_tile, select_tile, split_tile

LIST_ROWS = 64
"""Rows that share a list of keys. A list is w + 63 entries at most, 3 % more than a row keeps at w = 2048. A tile of
rows must lie within a list.
"""
SPLIT_ROWS = 8
"""Up to so many new tokens the keys are split among programs. A tensor core's operand has 16 rows: one step of the
published models, with two query heads a key/value head, reads its keys once for 8 tokens.
"""
SPLIT_KEYS = 128
"""Keys of a part: 64 KiB of K and V at D 128 in 16 bits, enough loads in flight for one multiprocessor; at w = 2048 a
step has 16 parts.
"""

B, H, HKV, S, D, Q, K, W, P = (sym(name) for name in ("B", "H", "Hkv", "S", "D", "Q", "K", "W", "P"))
ROWS, WINDOW, SPLIT = sym("rows"), sym("keep_window_size"), sym("split_keys")
SPLIT_Q = minimum(Q, SPLIT_ROWS)

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
_ROWS = Attribute("rows", "int", "rows that share a list of keys", (16, 32, 64))
_SPLIT = Attribute("split_keys", "int", "keys of one part", (32, 64, 128, 256, 512))
_SLIDING = Attribute("sliding_window", "int", "slots that a row sees, its own and those before it; 0 for all before it")

_HEADS = (
    Limit(lambda v: v["H"] % v["Hkv"] == 0, "H a multiple of Hkv"),
    Limit(lambda v: v["S"] % v["Hkv"] == 0 and v["H"] % v["S"] == 0, "S a multiple of Hkv that divides H"),
    Limit(lambda v: v["H"] // v["S"] <= 16, "at most 16 query heads per score head"),
    Limit(lambda v: v["D"] % 8 == 0 and v["D"] <= 256, "D a multiple of 8, at most 256"),
)
_SLOTS = Limit(lambda v: v["K"] < 2**24, "K below 2^24")
_WINDOW_LIMIT = Limit(lambda v: v["keep_window_size"] >= 1, "keep_window_size at least 1")
_SLIDING_LIMIT = Limit(lambda v: v["sliding_window"] >= 0, "sliding_window at least 0")

_ATTENTION_CONSTANTS: dict[str, Operand] = {
    "SCALE": sym("scale"),
    "HEADS": H,
    "KV_HEADS": HKV,
    "SCORE_HEADS": S,
    "HEAD_DIM": D,
    "SPLIT_ROWS": SPLIT_ROWS,
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
        kernel="doge_plugins.dynamic_mask_attention.select_kernel:select_" + ("masked_kernel" if masked else "kernel"),
        scalars={"num_rows": Q, "num_slots": K},
        constants={"WINDOW": WINDOW, "ROWS": ROWS},
        static=(),
        grid=(cdiv(Q, ROWS), S, B),
        tiler=select_tile,
        limits=(_SLOTS, _WINDOW_LIMIT),
    )


_PARTS = (
    TensorSpec("partial", "float32", (B, H, SPLIT_Q, P, D), "sum of exp(logit - maximum) v; not written if empty"),
    TensorSpec("maximum", "float32", (B, H, SPLIT_Q, P), "largest logit of the part; -inf if empty"),
    TensorSpec("total", "float32", (B, H, SPLIT_Q, P), "sum of exp(logit - maximum)"),
)

Kind = Literal["", "Masked", "Selected"]
"""Over all visible keys, without slots that are masked, or over the keys of a list."""


@dataclass(frozen=True)
class _Variant:
    """What the kernels of one kind have in common."""

    kind: Kind

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        extra = {"": (), "Masked": (_KEY_MASK,), "Selected": (_THRESHOLD, _LAST_KEPT, *_list(ROWS))}
        return (_QUERY, _KEY, _VALUE, _SCORE, _FIRST_SLOT, *extra[self.kind])

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        return (_SCALE, _ROWS if self.kind == "Selected" else _SLIDING)

    @property
    def scalars(self) -> dict[str, Operand]:
        scalars: dict[str, Operand] = {"num_rows": Q, "num_slots": K}
        return scalars | ({"list_width": W} if self.kind == "Selected" else {})

    @property
    def constants(self) -> dict[str, Operand]:
        return _ATTENTION_CONSTANTS | (
            {"ROWS": ROWS} if self.kind == "Selected" else {"SLIDING": sym("sliding_window")}
        )

    @property
    def limits(self) -> tuple[Limit, ...]:
        return (*_HEADS, _SLOTS, *(() if self.kind == "Selected" else (_SLIDING_LIMIT,)))

    def kernel(self, name: str) -> str:
        kind = f"_{self.kind.lower()}" if self.kind else ""
        return f"doge_plugins.dynamic_mask_attention.kernel:{name}{kind}_kernel"


def _split(kind: Kind) -> PluginSpec:
    variant = _Variant(kind)
    parts = cdiv(W if kind == "Selected" else K, SPLIT)
    return PluginSpec(
        name="DynamicMaskSplit" + kind,
        doc=f"attention of up to {SPLIT_ROWS} rows over each part of split_keys keys by itself; nothing for more rows",
        inputs=variant.inputs,
        outputs=tuple(
            TensorSpec(part.name, part.dtype, tuple(parts if size is P else size for size in part.shape), part.doc)
            for part in _PARTS
        ),
        attributes=(*variant.attributes, _SPLIT),
        kernel=variant.kernel("split"),
        scalars=variant.scalars,
        constants={**variant.constants, "SPLIT_KEYS": SPLIT},
        static=("H", "Hkv", "S", "D"),
        grid=(parts, cdiv(SPLIT_Q, sym("BLOCK_ROWS")), B * S),
        tiler=split_tile,
        limits=variant.limits,
    )


def _attend(kind: Kind) -> PluginSpec:
    variant = _Variant(kind)
    return PluginSpec(
        name="DynamicMaskAttend" + kind,
        doc=f"softmax(q k^T * scale + score) v over the keys of each row; up to {SPLIT_ROWS} rows from their parts",
        inputs=(*variant.inputs, *_PARTS),
        outputs=(TensorSpec("output", "T", (B, H, Q, D)),),
        attributes=variant.attributes,
        kernel=variant.kernel("attend"),
        scalars={**variant.scalars, "num_parts": P},
        constants=variant.constants,
        static=("H", "Hkv", "S", "D"),
        # H programs combine parts; S of them attend, the others return
        grid=(cdiv(Q, sym("BLOCK_ROWS")), H, B),
        tiler=attend_tile,
        limits=variant.limits,
    )


KINDS: tuple[Kind, ...] = ("", "Masked", "Selected")
SPECS = (
    _select(False),
    _select(True),
    *(_split(kind) for kind in KINDS),
    *(_attend(kind) for kind in KINDS),
)
_BY_NAME = {spec.name: spec for spec in SPECS}


def chain(attributes: Mapping[str, Any], inputs: frozenset[str]) -> tuple[Step, ...]:
    """The nodes that compute one DynamicMaskAttention node, for any number of new tokens.

    Args:
        attributes: `keep_window_size`, `scale` and `sliding_window`, if there is one, of the node. A window of 0 keeps
            every key: write 0 too where the cache can never hold more than the window, and no select node is made.
        inputs: names of its inputs, with `key_mask` if the node has it.

    Raises:
        UnsupportedModelError: the node has a sliding window above its `keep_window_size`. What a row sees does not only
            grow there, and one list of keys for a block of rows rests on that.
    """
    window, scale = attributes["keep_window_size"], attributes["scale"]
    sliding = attributes.get("sliding_window") or 0
    if window and sliding > window:
        raise UnsupportedModelError(
            f"sliding_window={sliding}: DynamicMaskAttention's kernels take one up to keep_window_size={window}; keep "
            "the operator's standard body"
        )
    if sliding:
        window = 0  # a row sees too few keys for one to be dropped
    mask = ("key_mask",) if "key_mask" in inputs else ()
    kind: Kind = "Masked" if mask else ""
    extra: tuple[str, ...] = mask
    own: dict[str, Any] = {"scale": scale, "sliding_window": sliding}
    steps = []
    if window:
        extra = ("threshold", "last_kept", "kept", "kept_count")
        steps.append(
            Step(
                _BY_NAME["DynamicMaskSelect" + kind],
                ("score", "first_slot", "query", *mask),
                extra,
                {"keep_window_size": window, "rows": LIST_ROWS},
            )
        )
        # the lists hold visible keys only, so what follows needs no mask
        kind, own = "Selected", {"scale": scale, "rows": LIST_ROWS}
    tensors = ("query", "key", "value", "score", "first_slot", *extra)
    parts = tuple(part.name for part in _PARTS)
    steps.append(Step(_BY_NAME["DynamicMaskSplit" + kind], tensors, parts, {**own, "split_keys": SPLIT_KEYS}))
    steps.append(Step(_BY_NAME["DynamicMaskAttend" + kind], (*tensors, *parts), ("output",), own))
    return tuple(steps)


PLUGIN = OperatorPlugin("DynamicMaskAttention", SPECS, chain, costs=COSTS)
