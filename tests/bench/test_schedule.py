"""The order of candidates."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from doge_deploy.bench.schedule import rotated


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_everyone_stands_twice_in_every_place(n: int) -> None:
    orders = [rotated(range(n), number) for number in range(2 * n)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    places = Counter((place, candidate) for order in orders for place, candidate in enumerate(order))
    assert len(places) == n * n and set(places.values()) == {2}


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_neighbours_follow_each_other_equally_often(n: int) -> None:
    orders = [rotated(range(n), number) for number in range(2 * n)]
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert all(follows[a, b] == follows[b, a] for a, b in follows)
