"""The window's bias over the slots in use, as a local function whose selection verification can see.

    bias[b, h, q, j] = score[b, h, j]   if slot j is visible to row q and among its w best, lowest slot first
                       hidden           otherwise

The same selection as in the body of doge::DynamicMaskAttention, over the slots in use instead of `max_length`, and only
where there are more than w of them.
"""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.graph.functions.text import parse_function
from doge_deploy.graph.schemas import WINDOW_BIAS

_BODY = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_one = Constant <value_ints = [1]> ()
    row_axes = Constant <value_ints = [1, 3]> ()
    row_shape = Constant <value_ints = [0, 0, 1, -1]> ()
    row_score = Reshape (score, row_shape)
    num_columns = Shape <start = 2, end = 3> (score)
    columns_scalar = Squeeze (num_columns)
    rows_scalar = Squeeze (tokens)
    rows = Range (zero, rows_scalar, one)
    columns = Range (zero, columns_scalar, one)
    first_column = Unsqueeze (first_slot, axis_one)
    row_slot = Add (first_column, rows)
    row_slot_4d = Unsqueeze (row_slot, row_axes)
    visible = LessOrEqual (columns, row_slot_4d)
    window_scalar = Constant <value_int: int = @keep_window_size> ()
    beyond = Greater (columns_scalar, window_scalar)
    kept = If (beyond) <
        then_branch = select () => (bool[b, h, q, k] selected) {
            then_axis = Constant <value_ints = [0]> ()
            window = Unsqueeze (window_scalar, then_axis)
            lowest = Constant <value_float = -1.0> ()
            ranked = Where (visible, row_score, lowest)
            best_score, best_index = TopK <axis = -1, largest = 1, sorted = 0> (ranked, window)
            ranked_shape = Shape (ranked)
            none = ConstantOfShape <value = bool[1] {0}> (ranked_shape)
            best_shape = Shape (best_index)
            all = ConstantOfShape <value = bool[1] {1}> (best_shape)
            in_window = ScatterElements <axis = -1> (none, best_index, all)
            selected = And (visible, in_window)
        },
        else_branch = keep_all () => (bool[b, h, q, k] everything) {
            repeats = Constant <value_ints = [1, KV_HEADS, 1, 1]> ()
            everything = Expand (visible, repeats)
        }
    >
    hidden = Constant <value_float = HIDDEN> ()
    kv_bias = Where (kept, row_score, hidden)
"""

HIDDEN_BIAS = -1.7014118346046923e38
"""Half of float32's lowest number, as in the standard body: see `doge_deploy.model.attention.hidden_bias`."""


def window_bias_function(heads: int, kv_heads: int) -> ir.Function:
    """doge::WindowBias for a graph with `heads` query and `kv_heads` key heads.

    Inputs: score `[B, Hkv, K, 1]` of the slots in use, first_slot `[B]`, tokens `[1]` (Q).
    Output: `[B, 1 or H, Q, K]`.
    """
    body = _BODY.replace("KV_HEADS", str(kv_heads)).replace("HIDDEN", repr(HIDDEN_BIAS))
    if kv_heads in (1, heads):
        body += "    bias = Identity (kv_bias)\n"
    else:
        head_map = ", ".join(str(head // (heads // kv_heads)) for head in range(heads))
        body += f"    head_map = Constant <value_ints = [{head_map}]> ()\n"
        body += "    bias = Gather <axis = 1> (kv_bias, head_map)\n"
    return parse_function(WINDOW_BIAS, ["score", "first_slot", "tokens"], ["bias"], ["keep_window_size"], body)
