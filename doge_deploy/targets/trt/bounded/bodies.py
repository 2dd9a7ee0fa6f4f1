"""The two attentions of a cache of w slots: one token in place, and a chunk of tokens with what is left of it.

A row of the cache is one key head of one text. It has w slots, each with a key, a value and a rank: the score of the
key, and the position of its token plus 1, or 0 where the slot is empty. Zeros are thus an empty cache.

Of two keys the one with the lower score is worse, of equal scores the later token: ties go to the earliest, as
everywhere. An empty slot is worse than any key, and the lower of two is; so a text that fits into the window lies in
the order of its tokens. Every token that comes in pushes out the worst of them, maybe itself. A key that
once was pushed out never comes back, because what a row sees only grows.

Axes: B texts, Hkv key heads, N = B * Hkv rows of the cache, G query heads of a key head, H = Hkv * G, w slots, Q tokens
of a call, M slots that a call may empty at most, D size of a head.
"""

from __future__ import annotations

import ml_dtypes
import onnx_ir as ir

from doge_deploy.graph.functions.text import parse_function
from doge_deploy.targets.trt.bounded.choices import LONGEST_TEXT

DECODE, PREFILL = "BoundedDecode", "BoundedPrefill"
"""Names of the local functions, which exist only until they are inlined."""

KEPT_UNTIL, KEPT_POSITIONS = "kept_until", "kept_positions"
"""What the tokens of PREFILL see, for verification, `[N, 1, w + Q, 1]` float32 each: the key of token
`kept_positions - 1` is seen by the tokens of the call before number `kept_until`, from its own on."""

INPUTS = ("query", "key", "value", "score", "position", "past_key", "past_value", "past_rank")
"""query `[B, H, Q, D]`; key and value `[B, Hkv, Q, D]` and score `[B, Hkv, Q, 1]` float32 of the new tokens; position
of the first one `[B]` int64; the cache, key and value `[N, 1, w, D]`, rank `[N, 1, w, 2]` float32. PREFILL has one
more: how many tokens of each text are real, `[B]` int64; padding follows them."""

OUTPUTS = ("output", "present_key", "present_value", "present_rank")
"""output `[B, H, Q, D]`; the cache with the new tokens. PREFILL has two more, `KEPT_UNTIL` and `KEPT_POSITIONS`."""

_FAR = 2 * LONGEST_TEXT
"""More than any age; the sum of both is a whole number that float32 has."""

_OLD_AND_NEW = """
    rows = Constant <value_ints = [-1, 1, 0, 0]> ()
    new_key = Reshape (key, rows)
    new_value = Reshape (value, rows)
    new_score = Reshape (score, rows)
    query_rows = Constant <value_ints = [-1, GROUP, 0, 0]> ()
    row_query = Reshape (query, query_rows)
    slots = Constant <value_ints = [WINDOW]> ()
    slots_scalar = Constant <value_int = WINDOW> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    one_1d = Constant <value_ints = [1]> ()
    two = Constant <value_int = 2> ()
    two_1d = Constant <value_ints = [2]> ()
    three = Constant <value_int = 3> ()
    three_1d = Constant <value_ints = [3]> ()
    zero_1d = Constant <value_ints = [0]> ()
    old_score = Gather <axis = 3> (past_rank, zero_1d)
    old_position = Gather <axis = 3> (past_rank, one_1d)
    none = Constant <value_float = 0.0> ()
    is_empty = Equal (old_position, none)
    empty_score = Constant <value_float = -1.0> ()
    old_worth = Where (is_empty, empty_score, old_score)
    slot_numbers = Range (zero, slots_scalar, one)
    slot_floats = Cast <to = 1> (slot_numbers)
    slot_shape = Constant <value_ints = [1, 1, WINDOW, 1]> ()
    slot_4d = Reshape (slot_floats, slot_shape)
    slot_age = Neg (slot_4d)
    old_age = Where (is_empty, slot_age, old_position)
    whole_heads = Constant <value_ints = [HEAD_ZEROS]> ()
    heads_shape = Constant <value_ints = [1, -1]> ()
    heads = Reshape (whole_heads, heads_shape)
    position_column = Unsqueeze (position, one_1d)
    row_positions = Add (position_column, heads)
    one_a_row = Constant <value_ints = [-1, 1, 1, 1]> ()
    row_position = Reshape (row_positions, one_a_row)
"""
"""TensorRT-RTX 1.7 does not build a cache that is written in place and read by Split or Slice ("uses before defs").

`old_worth` and `old_age` `[N, 1, w, 1]`: the worst slot is that of the lowest worth, of these that of the highest
age. Of empty slots the ages are 0, -1, -2, ..."""

_ATTEND = """
    hidden_float = Constant <value_float = HIDDEN> ()
    hidden = CastLike (hidden_float, query)
    row_score_cast = CastLike (row_score, query)
    bias = Where (visible, row_score_cast, hidden)
    attended = Attention <scale: float = @scale, softmax_precision = 1> (row_query, all_keys, all_values, bias)
    output_shape = Constant <value_ints = [-1, HEADS, 0, 0]> ()
    output = Reshape (attended, output_shape)
"""

_DECODE = """
    next_position = Add (row_position, one)
    new_position = Cast <to = 1> (next_position)
    new_rank = Concat <axis = 3> (new_score, new_position)
    worth_or_new = Min (old_worth, new_score)
    worst = ReduceMin <keepdims = 1> (worth_or_new, two_1d)
    is_worst = Equal (old_worth, worst)
    youngest = Constant <value_float = YOUNGEST> ()
    age_of_worst = Where (is_worst, old_age, youngest)
    oldest, slot = TopK <axis = 2, largest = 1, sorted = 0> (age_of_worst, one_1d)
    is_better = Greater (new_score, worst)
    all_rows = Constant <value_ints = [-1]> ()
    slot_of_row = Reshape (slot, all_rows)
    old_key = GatherND <batch_dims = 2> (past_key, slot)
    old_value = GatherND <batch_dims = 2> (past_value, slot)
    old_rank = GatherND <batch_dims = 2> (past_rank, slot)
    key_row = Where (is_better, new_key, old_key)
    value_row = Where (is_better, new_value, old_value)
    rank_row = Where (is_better, new_rank, old_rank)
    present_key = TensorScatter <axis = -2> (past_key, key_row, slot_of_row)
    present_value = TensorScatter <axis = -2> (past_value, value_row, slot_of_row)
    present_rank = TensorScatter <axis = -2> (past_rank, rank_row, slot_of_row)
    all_keys = Identity (present_key)
    all_values = Identity (present_value)
    kept_score = Gather <axis = 3> (present_rank, zero_1d)
    kept_position = Gather <axis = 3> (present_rank, one_1d)
    one_row = Constant <value_ints = [0, 0, 1, -1]> ()
    row_score = Reshape (kept_score, one_row)
    row_kept_position = Reshape (kept_position, one_row)
    visible = Greater (row_kept_position, none)
"""

"""The new key takes part in the search for the worst, though it never lies in the slot that is found: a search that
depends on the cache alone TensorRT-RTX 1.7 does for all layers at once, and then it fails with "uses before defs" (seen
with mixtures). Where the new key is the worst, any slot is found, and its own row is written back.
"""

_PREFILL = """
    num_tokens = Shape <start = 2, end = 3> (key)
    num_tokens_scalar = Squeeze (num_tokens)
    tokens = Range (zero, num_tokens_scalar, one)
    token_column = Unsqueeze (tokens, one_1d)
    token_position = Add (token_column, row_position)
    next_position = Add (token_position, one)
    new_age = Cast <to = 1> (next_position)
    new_rank = Concat <axis = 3> (new_score, new_age)

    most = Constant <value_ints = [MOST]> ()
    lowest, lowest_slot = TopK <axis = 2, largest = 0, sorted = 0> (old_worth, most)
    last_worth = ReduceMax <keepdims = 1> (lowest, two_1d)
    is_below = Less (old_worth, last_worth)
    is_tied = Equal (old_worth, last_worth)
    far = Constant <value_float = FAR> ()
    below_age = Add (old_age, far)
    above_age = Constant <value_float = YOUNGEST> ()
    tied_age = Where (is_tied, old_age, above_age)
    any_age = Where (is_below, below_age, tied_age)
    chosen_age, chosen = TopK <axis = 2, largest = 1, sorted = 1> (any_age, most)
    chosen_worth = GatherElements <axis = 2> (old_worth, chosen)
    chosen_old_age = GatherElements <axis = 2> (old_age, chosen)

    worth = Concat <axis = 2> (chosen_worth, new_score)
    age = Concat <axis = 2> (chosen_old_age, new_age)
    worth_row = Transpose <perm = [0, 1, 3, 2]> (worth)
    age_row = Transpose <perm = [0, 1, 3, 2]> (age)
    is_lower = Less (worth, worth_row)
    is_equal = Equal (worth, worth_row)
    is_later = Greater (age, age_row)
    is_equal_and_later = And (is_equal, is_later)
    is_worse = Or (is_lower, is_equal_and_later)
    worse = Cast <to = 1> (is_worse)
    most_and_new = Concat <axis = 0> (most, num_tokens)
    worse_of_old, worse_of_new = Split <axis = 2> (worse, most_and_new)
    old_count = ReduceSum <keepdims = 1> (worse_of_old, two_1d)
    new_count = CumSum (worse_of_new, two)
    count = Add (old_count, new_count)
    token_floats = Cast <to = 1> (token_column)
    stays = Greater (count, token_floats)
    here_already = ConstantOfShape <value = int64[1] {0}> (most)
    come_at = Concat <axis = 0> (here_already, tokens)
    has_come = LessOrEqual (come_at, token_column)
    is_there = And (stays, has_come)
    there = Cast <to = 1> (is_there)
    calls_there = ReduceSum <keepdims = 1> (there, two_1d)
    come_at_floats = Cast <to = 1> (come_at)
    until_row = Add (calls_there, come_at_floats)
    until = Transpose <perm = [0, 1, 3, 2]> (until_row)
    until_old, until_new = Split <axis = 2> (until, most_and_new)

    end = Cast <to = 1> (num_tokens)
    slot_end = Where (is_empty, none, end)
    slot_until_chosen = ScatterElements <axis = 2> (slot_end, chosen, until_old)
    slot_until = Where (is_empty, none, slot_until_chosen)
    KEPT_UNTIL = Concat <axis = 2> (slot_until, until_new)
    KEPT_POSITIONS = Concat <axis = 2> (old_position, new_age)
    one_row = Constant <value_ints = [0, 0, 1, -1]> ()
    until_of_all = Reshape (KEPT_UNTIL, one_row)
    is_before_end = Less (token_floats, until_of_all)
    slots_from = ConstantOfShape <value = int64[1] {0}> (slots)
    seen_from = Concat <axis = 0> (slots_from, tokens)
    is_seen = LessOrEqual (seen_from, token_column)
    visible = And (is_before_end, is_seen)
    all_keys = Concat <axis = 2> (past_key, new_key)
    all_values = Concat <axis = 2> (past_value, new_value)
    all_ranks = Concat <axis = 2> (past_rank, new_rank)
    all_scores = Concat <axis = 2> (old_score, new_score)
    row_score = Reshape (all_scores, one_row)

    length_column = Unsqueeze (lengths, one_1d)
    row_lengths = Add (length_column, heads)
    row_length = Reshape (row_lengths, one_a_row)
    real_end = Cast <to = 1> (row_length)
    is_freed = Less (until_old, real_end)
    freed = Cast <to = 1> (is_freed)
    freed_number = CumSum (freed, two)
    new_until_row = Reshape (until_new, one_row)
    is_staying = GreaterOrEqual (new_until_row, real_end)
    staying = Cast <to = 1> (is_staying)
    staying_number = CumSum (staying, three)
    is_same_number = Equal (freed_number, staying_number)
    is_for_it = And (is_same_number, is_staying)
    for_it = Cast <to = 1> (is_for_it)
    token_places = Add (tokens, slots_scalar)
    token_place_floats = Cast <to = 1> (token_places)
    place_for_it = Mul (for_it, token_place_floats)
    new_place = ReduceSum <keepdims = 1> (place_for_it, three_1d)
    new_place_number = Cast <to = 7> (new_place)
    place = Where (is_freed, new_place_number, chosen)
    slot_numbers_4d = Reshape (slot_numbers, slot_shape)
    cache_rows = Shape (old_position)
    own_places = Expand (slot_numbers_4d, cache_rows)
    places = ScatterElements <axis = 2> (own_places, chosen, place)
    present_key = GatherND <batch_dims = 2> (all_keys, places)
    present_value = GatherND <batch_dims = 2> (all_values, places)
    present_rank = GatherND <batch_dims = 2> (all_ranks, places)
""".replace("KEPT_UNTIL", KEPT_UNTIL).replace("KEPT_POSITIONS", KEPT_POSITIONS)
"""Which of the new tokens see a key: those before number `until`, from its own on. A token pushes out the worst key, so
before token q is through a key `stays` if more than q of the keys there are worse than it. They are counted among the M
worst of the cache and the new ones: nothing else can be pushed out by Q <= M tokens, and where Q is more, M is w.

Padding is counted as the standard graph counts it, by its own rows alone, since it comes last; but it never stays in
the cache, nor pushes a key out of it: what stays is what the last real token leaves. The slots that are freed take the
new keys in order; padding has the last numbers, for which no slot is left.
"""


def bounded_function(
    kind: str, *, heads: int, kv_heads: int, window: int, longest_call: int, hidden_dtype: ir.DataType
) -> ir.Function:
    """The local function `doge::kind`.

    Args:
        kind: `DECODE` or `PREFILL`.
        heads: H.
        kv_heads: Hkv.
        window: w.
        longest_call: of PREFILL, the most tokens that a call can have.
        hidden_dtype: of the model, whose lowest number hides a key: half of it, as in the standard body.
    """
    body = _OLD_AND_NEW + (_DECODE if kind == DECODE else _PREFILL) + _ATTEND
    hidden = float(ml_dtypes.finfo(hidden_dtype.numpy()).min) / 2  # type: ignore[no-untyped-call]
    words = {
        "HEAD_ZEROS": ", ".join(["0"] * kv_heads),
        "HEADS": str(heads),
        "GROUP": str(heads // kv_heads),
        "WINDOW": str(window),
        "MOST": str(min(window, longest_call)),
        "HIDDEN": repr(hidden),
        "YOUNGEST": repr(-2.0 * _FAR),
        "FAR": repr(float(_FAR)),
    }
    for word, text in words.items():
        body = body.replace(word, text)
    inputs = [*INPUTS, *(["lengths"] if kind == PREFILL else [])]
    outputs = [*OUTPUTS, *([KEPT_UNTIL, KEPT_POSITIONS] if kind == PREFILL else [])]
    return parse_function(kind, inputs, outputs, ["scale"], body)
