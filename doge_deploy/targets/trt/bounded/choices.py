"""Whether the cache of an engine holds the window, and which calls its prefill takes."""

from __future__ import annotations

from doge_deploy.bundle.engine_record import EngineProfile
from doge_deploy.bundle.signature import BATCH, CACHE_ROWS, SEQUENCE
from doge_deploy.config.model import DogeFacts
from doge_deploy.devices.tensorrt_limits import TOPK_LIMIT
from doge_deploy.errors import UsageError
from doge_deploy.options.build import BuildOptions, Range

LONGEST_TEXT = 1 << 22
"""Positions are kept in float32, which has all whole numbers up to 2^24."""

CHUNK = 512
"""Tokens of a prefill that are computed at once: `[Q, w + Q]` numbers per head are attended to."""

WHOLE = 2048
"""The same where a call may not be cut."""

_ONE = Range(min=1, opt=1, max=1)


def window_of(facts: DogeFacts, max_length: int, *, inlined: bool) -> int:
    """w where a cache of native layers holds the window; 0 where it has a slot for each token.

    That is so where no key is ever dropped; where keys are dropped by their age too, since what a row sees no longer
    only grows; where the query heads of a key head keep different keys (legacy revisions); where positions are no exact
    numbers of float32; and where attention is no longer one node (`inlined`).
    """
    if inlined:
        return 0
    window, sliding = facts.reachable_windows(max_length)
    is_shared = facts.num_score_heads == facts.num_key_value_heads
    return window if not sliding and is_shared and max_length <= LONGEST_TEXT else 0


def longest_call(max_length: int, *, whole: bool) -> int:
    """Tokens of a prefill that are computed at once where nothing else is asked for.

    Args:
        max_length: most tokens of a row.
        whole: a call may not be cut.
    """
    return min(WHOLE if whole else CHUNK, max_length)


def bounded_profiles(
    options: BuildOptions, facts: DogeFacts, max_length: int, *, whole_calls: str
) -> tuple[tuple[EngineProfile, ...], tuple[EngineProfile, ...]]:
    """The profiles of the network that decodes, and of that for more tokens; the latter empty where none is wanted.

    Args:
        options: ranges as asked for; of a prefill only the longest call counts, since longer ones are cut and what is
            left over may be short.
        facts: of the model, whose cache holds the window.
        max_length: most tokens of a row.
        whole_calls: why a call may not be cut; empty where it may.

    Raises:
        UsageError: the options do not fit the bundle.
    """
    window = facts.keep_window_size
    if options.profiles == "shared":
        raise UsageError(
            f"profiles=shared: a text of {max_length} tokens can exceed the window of {window}, so there is one engine "
            "that decodes and one for prefill; leave it out, or export with --max-length "
            f"{window}"
        )
    longest = longest_call(max_length, whole=bool(whole_calls))
    asked = options.sequence_length or Range(min=1, opt=min(CHUNK, longest), max=longest)
    if asked.max > max_length:
        raise UsageError(
            f"sequence_length={asked}: a call of {asked.max} tokens does not fit, "
            f"the bundle's max_length is {max_length}"
        )
    if min(asked.max, window) > TOPK_LIMIT:
        raise UsageError(
            f"sequence_length={asked}: a call of {asked.max} tokens ranks as many keys of a window of {window}, and "
            f"TensorRT's TopK takes at most {TOPK_LIMIT}; a longer call "
            + ("cannot be run here: " + whole_calls if whole_calls else "is cut into such anyway")
        )
    decode = (_profile("decode", options.batch_size, _ONE, facts),)
    if asked.max == 1:
        return decode, ()
    tokens = Range(min=1, opt=asked.opt, max=asked.max)
    return decode, (_profile("prefill", options.batch_size, tokens, facts),)


def _profile(name: str, batch: Range, tokens: Range, facts: DogeFacts) -> EngineProfile:
    heads = facts.num_key_value_heads
    rows = Range(min=batch.min * heads, opt=batch.opt * heads, max=batch.max * heads)
    return EngineProfile(name=name, axes={BATCH: batch, SEQUENCE: tokens, CACHE_ROWS: rows})
