"""Which sums of two sorted halves can be among the best: the pairs that a mixture of experts forms."""

from __future__ import annotations


def candidate_pairs(k: int, n: int) -> list[tuple[int, int]]:
    """Ranks (i, j), 0-based, of the sorted halves that can hold one of the `k` best sums.

    The (i+1)*(j+1) pairs that are no worse in both halves are at least as good, so a pair with more than `k` of
    them is never needed. In lexicographic order, which is the order of the unpruned table: ties fall the same way.
    """
    return [(i, j) for i in range(min(k, n)) for j in range(min(k, n)) if (i + 1) * (j + 1) <= k]
