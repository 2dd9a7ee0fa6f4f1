"""The chain of stages is transformers: what errors are charged by must not have errors of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import shared_bundle
from random_doge import DYNAMIC, SMALL_MOE, shared_doge
from sweeps import cases

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.signature import UNCACHED
from doge_deploy.verify.cases import exact_case
from doge_deploy.verify.compare import difference
from doge_deploy.verify.live import LiveOracle
from doge_deploy.verify.localize.calls import view_calls
from doge_deploy.verify.localize.oracle import Context, Stages, to_array
from doge_deploy.verify.parity import make_replay
from doge_deploy.verify.reference_run import run_reference
from doge_deploy.verify.source import open_reference

KINDS: dict[str, tuple[str | dict[str, Any], dict[str, Any]]] = {
    "dense": ("doge-tiny", {"kv_cache": ("static", "growing")}),
    "half": ("doge-tiny", {"dtype": "fp16"}),
    "mixture": ("doge-tiny-moe", {"kv_cache": ("static", "growing")}),
    "mixture-per-token": ("doge-tiny-moe", {"routing": "per-token"}),
    "sliding": ({"sliding_window": 6}, {"kv_cache": ("static", "growing")}),
    "rope-with-a-memory": (
        {"rope_parameters": {**DYNAMIC, "original_max_position_embeddings": 16}},
        {"kv_cache": ("static",)},
    ),
    "many-experts-normalised": ({**SMALL_MOE, "norm_topk_prob": True}, {}),
}


@pytest.mark.parametrize(("model", "options"), cases(KINDS, ["dense", "mixture-per-token"]))
def test_the_chain_of_stages_gives_what_transformers_gives(
    model: str | dict[str, Any], options: dict[str, Any]
) -> None:
    source: str | Path = model if isinstance(model, str) else shared_doge(**model)
    bundle = open_bundle(shared_bundle(source, **options))
    with LiveOracle(bundle, open_reference(bundle, str(source))) as oracle:
        for layout in bundle.manifest.layouts:
            for name in oracle.case_names()[:-2]:
                _compare(bundle, oracle, layout, name)


def _compare(bundle: Any, oracle: LiveOracle, layout: str, name: str) -> None:
    manifest = bundle.manifest
    facts, references = manifest.facts, oracle.references
    case = exact_case(oracle.limits, 0, name)
    replay = make_replay(manifest, layout, last_logits=False)
    theirs, wider = (run_reference(replay, one, case).logits for one in (references.same, references.wider))
    stages = Stages(references.same, manifest.options.routing)
    views = view_calls(case.calls, layout, facts)
    static = layout not in ("growing", UNCACHED)
    window = facts.keep_window_size if bundle.layout(layout).keep_window else 0
    rotations = stages.rotations(views)
    states = [stages.embedding(view) for view in views]
    for layer in range(facts.num_hidden_layers):
        cache = stages.empty_cache(len(views[0].ids), max(view.columns for view in views) if static else 0)
        for index, view in enumerate(views):
            context = Context(view, rotations[index], cache, static, window)
            values = stages.layer(layer, states[index], context)
            cache, states[index] = context.advanced(values, facts), values["mlp_residual"]
    ours = []
    for state, view in zip(states, views, strict=True):
        logits = to_array(stages.head(stages.norm(state)))
        ours += [logits[b][view.real[b]] for b in range(len(logits))]
    noise, found = difference(theirs, wider), difference(ours, theirs)
    assert found.max_abs <= max(6 * noise.max_abs, 1e-6), (layout, name)


def test_the_chain_is_held_to_the_digit() -> None:
    """Without padding, calls of one row make the very same sums: any other arithmetic would show."""
    bundle = open_bundle(shared_bundle("doge-tiny", kv_cache=("static", "growing")))
    with LiveOracle(bundle, open_reference(bundle, None)) as oracle:
        case = exact_case(oracle.limits, 0, "prefill")
        stages = Stages(oracle.references.same, "reference")
        (view,) = view_calls(case.calls, "static", bundle.manifest.facts)
        x, (rotation,) = stages.embedding(view), stages.rotations([view])
        for layer in range(bundle.manifest.facts.num_hidden_layers):
            cache = stages.empty_cache(1, view.columns)
            x = stages.layer(layer, x, Context(view, rotation, cache, static=True, window=64))["mlp_residual"]
        theirs = run_reference(make_replay(bundle.manifest, "static", last_logits=False), oracle.references.same, case)
        assert np.array_equal(to_array(stages.head(stages.norm(x)))[0], theirs.logits[0].astype(np.float32))
