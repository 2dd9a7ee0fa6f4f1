"""Routing: pruned candidates against the whole table, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doge_deploy.config.expert_pairs import candidate_pairs
from doge_deploy.model.moe import route, split_router


@pytest.mark.parametrize(("k", "count"), [(16, 50), (32, 119), (48, 198), (64, 280)])
def test_number_of_candidates_of_the_published_sizes(k: int, count: int) -> None:
    assert len(candidate_pairs(k, 128)) == count


def unpruned(halves: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k best of all n*n sums, in the order of the sorted halves: what transformers forms."""
    n = halves.shape[-1]
    order = torch.sort(halves, dim=-1, descending=True, stable=True)
    sums = (order.values[0][:, :, None] + order.values[1][:, None, :]).flatten(1)
    ids = (order.indices[0][:, :, None] * n + order.indices[1][:, None, :]).flatten(1)
    return ids.gather(1, torch.sort(sums, dim=-1, descending=True, stable=True).indices[:, :k])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.data())
def test_pruning_is_exact_with_any_number_of_ties(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n * n))
    levels = data.draw(st.integers(1, 6))  # few levels: nearly everything ties
    seed = data.draw(st.integers(0, 2**16))
    halves = torch.randint(levels, (2, 5, n), generator=torch.Generator().manual_seed(seed)).float()
    ids, weights = route(halves, k, norm_topk_prob=False)
    assert torch.equal(ids, unpruned(halves, k))
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))


def test_routings_agree_on_one_token_only() -> None:
    one, two = torch.randn(1, 1, 8), torch.randn(1, 2, 8)
    assert torch.equal(split_router(one, "reference"), split_router(one, "per-token"))
    assert not torch.equal(split_router(two, "reference"), split_router(two, "per-token"))
    assert torch.equal(split_router(two, "per-token")[:, 1], two[0, 1].view(2, 4))
