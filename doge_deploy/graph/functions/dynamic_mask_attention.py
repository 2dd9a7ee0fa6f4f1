"""Body of doge::DynamicMaskAttention.

    bias[b, h, q, j] = score[b, s, j]   if slot j is visible to row q and among its w best, lowest index first
                       hidden           otherwise
    output = softmax(q k^T * scale + bias) v

"Visible" is j <= first_slot[b] + q, less than sliding_window slots back, and key_mask[b, j], the latter two where they
are given. Ranking is done on the float32 score, over
visible keys only, so a row that sees fewer than w keys keeps them all whatever the cache holds elsewhere.
Reference implementation: `doge_deploy.model.attention.dynamic_mask_attention`.
"""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.config.model import DogeFacts
from doge_deploy.graph.functions.text import parse_function
from doge_deploy.graph.functions.visible import CAUSAL, selected
from doge_deploy.graph.schemas import DYNAMIC_MASK_ATTENTION

KEPT = "kept"
"""Name of the value that holds the kept keys, `[B, S, Q, K]` bool; there where keys are selected; verification looks
at it.
"""

_SIZES = """
    num_rows = Shape <start = 2, end = 3> (query)
    num_columns = Shape <start = 2, end = 3> (key)
"""

_SLIDING = """
    reach = Constant <value_int: int = @sliding_window> ()
    last_hidden = Sub (row_slot_4d, reach)
    near = Greater (columns, last_hidden)
    seen = And (causal, near)
"""

_NOT_SLIDING = """
    seen = Identity (causal)
"""

_KEY_MASK = """
    key_axes = Constant <value_ints = [1, 2]> ()
    key_mask_4d = Unsqueeze (key_mask, key_axes)
    visible = And (seen, key_mask_4d)
"""

_NO_KEY_MASK = """
    visible = Identity (seen)
"""

_KEEP_WINDOW = """
    window_scalar = Constant <value_int: int = @keep_window_size> ()
    first_axis = Constant <value_ints = [0]> ()
    window = Unsqueeze (window_scalar, first_axis)
    window_reach = Min (window, num_columns)
""" + selected("visible", "window_reach", KEPT, in_order=True)

_BIAS = """
    row_score_cast = CastLike (row_score, query)
    hidden_float = Constant <value_float = HIDDEN> ()
    hidden = CastLike (hidden_float, query)
    score_bias = Where (kept, row_score_cast, hidden)
"""

_ATTEND = """
    output = Attention <scale: float = @scale, softmax_precision = 1> (query, key, value, bias)
"""


def dynamic_mask_attention_function(
    facts: DogeFacts, *, has_key_mask: bool, keep_window: bool, hidden_bias: float, sliding: bool = False
) -> ir.Function:
    """The local function for one graph.

    Args:
        facts: heads and groups of the checkpoint.
        has_key_mask: the node has a sixth input (growing caches).
        keep_window: the cache can exceed `keep_window_size`, so the top-w selection is part of the body.
        sliding: the node has the attribute `sliding_window`.
        hidden_bias: bias of a hidden key, see `doge_deploy.model.attention.hidden_bias`.
    """
    groups = facts.num_attention_heads // facts.num_score_heads
    body = _SIZES + CAUSAL + (_SLIDING if sliding else _NOT_SLIDING)
    body += _KEY_MASK if has_key_mask else _NO_KEY_MASK
    body += "    row_score = Transpose <perm = [0, 1, 3, 2]> (score)\n"
    body += _KEEP_WINDOW if keep_window else "    kept = Identity (visible)\n"
    body += _BIAS.replace("HIDDEN", repr(hidden_bias))
    if groups == 1:
        body += "    bias = Identity (score_bias)\n"
    else:
        # The G query heads of a key/value head share its bias; a legacy Doge has one per query head.
        head_map = ", ".join(str(head // groups) for head in range(facts.num_attention_heads))
        body += f"    head_map = Constant <value_ints = [{head_map}]> ()\n"
        body += "    bias = Gather <axis = 1> (score_bias, head_map)\n"
    inputs = ["query", "key", "value", "score", "first_slot", *(["key_mask"] if has_key_mask else [])]
    attributes = ["keep_window_size", "scale", *(["sliding_window"] if sliding else [])]
    return parse_function(DYNAMIC_MASK_ATTENTION, inputs, ["output"], attributes, body + _ATTEND)
