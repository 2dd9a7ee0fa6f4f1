"""A long call is computed in pieces, and nobody can tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundles import make_bundle
from random_doge import LONGROPE, SMALL, SMALL_MOE, save_random_doge

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.runtime.ort import open_runner, runners
from doge_deploy.runtime.ort.runners import StaticOrtRunner
from doge_deploy.verify.run import verify

CAN_BE_CUT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "logits-of-all": ({}, {"logits": "all"}),
    "moe-per-token": (SMALL_MOE, {"routing": "per-token"}),
}
STAYS_WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "moe-reference": (SMALL_MOE, {}),
    "longrope": ({"rope_parameters": {**LONGROPE}}, {}),
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "PIECE", 5)


def bundle_of(case: tuple[dict[str, Any], dict[str, Any]], path: Any) -> Bundle:
    config, options = case
    fixed = {"keep_window_size": 64, "max_position_embeddings": 64}
    fixed["head_dim"] = 8 if "rope_parameters" in config else 16  # as many as the factors of LONGROPE are for
    checkpoint = save_random_doge(path / "checkpoint", **{**SMALL, **config, **fixed})
    return open_bundle(make_bundle(checkpoint, path / "bundle", max_length=64, **options))


@pytest.fixture(scope="module", params=CAN_BE_CUT)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(CAN_BE_CUT[request.param], tmp_path_factory.mktemp(request.param))


def counted(runner: StaticOrtRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the runs of its session, as they come."""
    widths: list[int] = []
    run = runner._run_part

    def noted(first: int, input_ids: Any, lengths: Any) -> Any:
        widths.append(input_ids.shape[1])
        return run(first, input_ids, lengths)

    monkeypatch.setattr(runner, "_run_part", noted)
    return widths


CALLS = [[23, 4], [1, 1], [2, 12], [1, 1], [11, 11], [1, 1]]
"""Real tokens of two rows: rows that end in the first, a middle and the last piece of a call."""


def replay(runner: Any, *, keep: bool) -> list[np.ndarray[Any, Any]]:
    """Logits of the last real tokens, or of all real ones."""
    ids = np.random.default_rng(0).integers(3, SMALL["vocab_size"], (2, 64))
    runner.reset(2)
    done, found = np.zeros(2, int), []
    for lengths in CALLS:
        width = max(lengths)
        part = np.stack([np.resize(ids[b, done[b] : done[b] + n], width) for b, n in enumerate(lengths)])
        logits = runner.run(part, lengths)
        found += [logits[b, :n] if keep else logits[b] for b, n in enumerate(lengths)]
        done += lengths
    assert runner.row_lengths.tolist() == done.tolist()
    return found


@pytest.mark.parametrize("portable", [False, True], ids=["lowered", "standard"])
def test_pieces_give_what_the_call_gives(bundle: Bundle, portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = bundle.manifest.options.logits == "all"
    whole, cut = (open_runner(bundle, portable=portable) for _ in range(2))
    expected = replay(whole, keep=keep)
    monkeypatch.setattr(runners, "PIECE", 5)
    assert isinstance(cut, StaticOrtRunner)
    widths = counted(cut, monkeypatch)
    for mine, theirs in zip(replay(cut, keep=keep), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6)
    assert widths == [5, 5, 5, 5, 3, 1, 5, 5, 2, 1, 5, 5, 1, 1]
    for name, rows in whole.cache().items():
        for mine_row, row in zip(cut.cache()[name], rows, strict=True):
            np.testing.assert_allclose(mine_row, row, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("small_pieces")
def test_verify_judges_pieces(bundle: Bundle) -> None:
    report = verify(bundle.path, reference=str(bundle.path.parent / "checkpoint"), greedy_steps=16)
    assert report.passed, [(result.case, result.failures) for result in report.results]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("case", STAYS_WHOLE.values(), ids=STAYS_WHOLE)
def test_what_depends_on_its_call_stays_whole(
    case: tuple[dict[str, Any], dict[str, Any]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(case, tmp_path)
    runner = open_runner(bundle)
    assert isinstance(runner, StaticOrtRunner)
    widths = counted(runner, monkeypatch)
    replay(runner, keep=False)
    assert widths == [max(lengths) for lengths in CALLS]
