"""Which keys a row may see, and the best of them: ONNX text that several bodies share.

Axes: B batch, Hkv score heads, Q rows (new tokens), K columns (slots of the cache).
"""

from __future__ import annotations

CAUSAL = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_one = Constant <value_ints = [1]> ()
    row_axes = Constant <value_ints = [1, 3]> ()
    rows_scalar = Squeeze (num_rows)
    columns_scalar = Squeeze (num_columns)
    rows = Range (zero, rows_scalar, one)
    columns = Range (zero, columns_scalar, one)
    first_column = Unsqueeze (first_slot, axis_one)
    row_slot = Add (first_column, rows)
    row_slot_4d = Unsqueeze (row_slot, row_axes)
    causal = LessOrEqual (columns, row_slot_4d)
"""
"""`causal` `[B, 1, Q, K]` of `num_rows` `[1]`, `num_columns` `[1]` and `first_slot` `[B]`."""


def selected(visible: str, window: str, target: str, *, in_order: bool) -> str:
    """Nodes that give `target` `[B, Hkv, Q, K]`: the `window` best keys of `visible` by `row_score` `[B, Hkv, 1, K]`.

    Hidden keys rank below every score (none is negative): they are chosen only where fewer than w are visible, and
    dropped again. `in_order` makes TopK sort what it found, for runtimes that can do nothing else.
    """
    return f"""
    lowest = Constant <value_float = -1.0> ()
    ranked = Where ({visible}, row_score, lowest)
    best_score, best_index = TopK <axis = -1, largest = 1, sorted = {int(in_order)}> (ranked, {window})
    ranked_shape = Shape (ranked)
    none = ConstantOfShape <value = bool[1] {{0}}> (ranked_shape)
    best_shape = Shape (best_index)
    all = ConstantOfShape <value = bool[1] {{1}}> (best_shape)
    in_window = ScatterElements <axis = -1> (none, best_index, all)
    {target} = And ({visible}, in_window)
"""
