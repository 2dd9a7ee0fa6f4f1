"""Small graphs of `doge` operators and plugin nodes, written in ONNX's text form."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

ATTENTION = """
<ir_version: 10, opset_import: ["" : 24, "doge" : 1]>
model (T[B, H, Q, D] query, T[B, HKV, K, D] key, T[B, HKV, K, D] value, float[B, HKV, K, 1] score,
       int64[B] first_slot, bool[B, K] key_mask) => (T[B, H, Q, D] mixed) {
    mixed = doge.DynamicMaskAttention <keep_window_size = WINDOW, scale = 0.125>
        (query, key, value, score, first_slotMASK)
}
"""

MOE = """
<ir_version: 10, opset_import: ["" : 24, "doge" : 1]>
model (T[B, Q, 64] hidden, T[B, Q, 32] router, T[256, 64] down, T[256, 64] up) => (T[B, Q, 64] mixed) {
    mixed = doge.CDMoE <num_experts_per_tok = 8, norm_topk_prob = 0, routing = "reference", activation = "silu">
        (hidden, router, down, up)
}
"""


def attention_graph(*, window: int = 16, masked: bool = False, dtype: str = "float16", **sizes: int | str) -> ir.Model:
    """One DynamicMaskAttention without a body; `sizes` give axes, others are names."""
    text = ATTENTION.replace("WINDOW", str(window)).replace("MASK", ", key_mask" if masked else "")
    for name, size in {"H": 4, "HKV": 2, "D": 64, **sizes}.items():
        text = text.replace(f"{name},", f"{size},").replace(f"{name}]", f"{size}]")
    return named(text.replace("T[", f"{dtype}["))


def moe_graph(dtype: str = "float16") -> ir.Model:
    """One CDMoE without a body."""
    return named(MOE.replace("T[", f"{dtype}["))


def named(text: str) -> ir.Model:
    """The model, each node named after its operator."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    for node in model.graph:
        node.name = f"layer.{node.op_type}"
    return model
