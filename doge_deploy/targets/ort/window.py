"""The window's bias over the slots in use, as a local function whose selection verification can see.

    bias[b, h, q, j] = score[b, h, j]   if slot j is visible to row q and among its w best, lowest slot first
                       hidden           otherwise

The same selection as in the body of doge::DynamicMaskAttention, over the slots in use instead of `max_length`, and only
where there are more than w of them.
"""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.graph.functions.text import parse_function
from doge_deploy.graph.functions.visible import CAUSAL, selected
from doge_deploy.graph.schemas import WINDOW_BIAS

_BODY = (
    """
    row_shape = Constant <value_ints = [0, 0, 1, -1]> ()
    row_score = Reshape (score, row_shape)
    num_rows = Identity (tokens)
    num_columns = Shape <start = 2, end = 3> (score)
"""
    + CAUSAL
    + """
    window_scalar = Constant <value_int: int = @keep_window_size> ()
    beyond = Greater (columns_scalar, window_scalar)
    kept = If (beyond) <
        then_branch = select () => (bool[b, h, q, k] selected) {
            then_axis = Constant <value_ints = [0]> ()
            window = Unsqueeze (window_scalar, then_axis)
"""
    + selected("VISIBLE", "window", "selected", in_order=False)
    + """
        },
        else_branch = keep_all () => (bool[b, h, q, k] everything) {
            repeats = Constant <value_ints = [1, KV_HEADS, 1, 1]> ()
            everything = Expand (VISIBLE, repeats)
        }
    >
    hidden = Constant <value_float = HIDDEN> ()
    kv_bias = Where (kept, row_score, hidden)
"""
)

_KEY_MASK = """
    key_axes = Constant <value_ints = [1, 2]> ()
    key_mask_4d = Unsqueeze (key_mask, key_axes)
    visible = And (causal, key_mask_4d)
"""

HIDDEN_BIAS = -1.7014118346046923e38
"""Half of float32's lowest number, as in the standard body: see `doge_deploy.model.attention.hidden_bias`."""


def window_bias_function(heads: int, kv_heads: int, *, key_mask: bool = False) -> ir.Function:
    """doge::WindowBias for a graph with `heads` query and `kv_heads` key heads.

    Inputs: score `[B, Hkv, K, 1]` of the slots in use, first_slot `[B]`, tokens `[1]` (Q) and, where `key_mask`,
    key_mask `[B, K]` bool, false for slots that nobody may see.
    Output: `[B, 1 or H, Q, K]`.
    """
    body = _BODY.replace("KV_HEADS", str(kv_heads)).replace("HIDDEN", repr(HIDDEN_BIAS))
    if key_mask:
        body = body.replace(CAUSAL, CAUSAL + _KEY_MASK)
    body = body.replace("VISIBLE", "visible" if key_mask else "causal")
    inputs = ["score", "first_slot", "tokens", *(["key_mask"] if key_mask else [])]
    if kv_heads in (1, heads):
        body += "    bias = Identity (kv_bias)\n"
    else:
        head_map = ", ".join(str(head // (heads // kv_heads)) for head in range(heads))
        body += f"    head_map = Constant <value_ints = [{head_map}]> ()\n"
        body += "    bias = Gather <axis = 1> (kv_bias, head_map)\n"
    return parse_function(WINDOW_BIAS, inputs, ["bias"], ["keep_window_size"], body)
