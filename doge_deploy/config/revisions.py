"""The revisions of the Doge architecture that this package knows, and what tells them apart in a graph.

Checkpoints do not name their revision; `checkpoint/legacy.py` finds it out.
Reference: `DogeAttention` in transformers' modeling_doge.py; repository SmallDoges/small-doge, modeling_doge.py at
42e5a63 (February 2025), efdbaaa (March 2025) and 0e305a7 (August 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

TRANSFORMERS = "transformers"

KEEPS_ALL = 2**31 - 1
"""The `keep_window_size` of a revision that never drops a key: more than any row can hold."""


@dataclass(frozen=True)
class Revision:
    """One revision of the architecture."""

    name: str
    title: str
    """For people."""
    qk_norm: bool
    """Queries and keys are RMS-normalised per head before they are rotated."""
    score_per_query_head: bool
    """`A` and `dt_proj` give a score per query head; else per key/value head."""
    drops_keys: bool
    """Beyond `keep_window_size` keys a row keeps the best ones; else it keeps all."""


REVISIONS = {
    revision.name: revision
    for revision in (
        Revision(TRANSFORMERS, "transformers 4.54 and later", True, False, True),
        Revision("2025-08", "legacy, original SmallDoge code of mid-2025", False, True, True),
        Revision("2025-03", "legacy, original SmallDoge code of March 2025", False, True, False),
        Revision("2025-02", "legacy, original SmallDoge code of February 2025", False, True, False),
    )
}
"""By name, the newest first."""
