"""Ten thousand tokens in an engine of 2048 slots, on a stand-in, against transformers in eager mode.

`python -m pytest -s tests/runtime/trt/test_bounded_long.py -m sweep` prints what it found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundles import shared_bundle
from random_doge import shared_doge
from transformers import DynamicCache

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.runtime.trt.in_ort import HostDevice
from doge_deploy.runtime.trt.lowered import open_lowered
from doge_deploy.verify.reference import Reference

TOKENS, PROMPT, BLOCK, WINDOW = 10_000, 6_000, 500, 2048

SIZE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": TOKENS,
    "keep_window_size": WINDOW,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
"""The 20M size."""


@pytest.mark.sweep
def test_ten_thousand_tokens() -> None:
    """A prompt of 6000 tokens in pieces, then 4000 one by one; no token comes twice.

    Where two scores are nearly equal at the edge of the window, either may stay: what the engine keeps must be as good
    as the best by the scores of the reference (certificate), and transformers, made to keep the same, must give the
    same logits.
    """
    path = shared_doge(**SIZE)
    bundle, reference = open_bundle(shared_bundle(path)), Reference(open_checkpoint(path), "float32")
    runner = open_lowered(bundle, bundle.layout("static"), exposed=True)
    device = runner.device
    assert isinstance(device, HostDevice)
    ids = np.random.default_rng(0).permutation(SIZE["vocab_size"])[:TOKENS]
    runner.reset(1)
    cache, held = DynamicCache(), 0
    worst, violation, differing, greedy, judged = 0.0, 0.0, 0, 0, 0
    for start in range(0, TOKENS, BLOCK):
        end = start + BLOCK
        calls = [(start, end)] if end <= PROMPT else [(at, at + 1) for at in range(start, end)]
        logits, kept = [], {f"kept.{layer}": np.zeros((1, 1, BLOCK, end), bool) for layer in range(8)}
        for begin, stop in calls:
            logits.append(runner.run(ids[None, begin:stop])[0, -1])
            for name, shown in runner.extra.items():
                kept[name][:, :, begin - start : stop - start, : shown.shape[3]] = shown
        if start >= PROMPT:
            size = sum(memory.nbytes for memory in device._alive.values())
            assert held in (0, size), "device memory grew"
            held = size
        given = kept if end > WINDOW else None
        found, watch = reference(
            ids[None, start:end], np.ones((1, end), np.int64), np.arange(start, end)[None], cache, given=given
        )
        expected = found[0].numpy()[[stop - 1 - start for _, stop in calls]]
        worst = max(worst, float(np.abs(np.stack(logits) - expected).max() / np.abs(expected).max()))
        greedy += int((np.stack(logits).argmax(-1) == expected.argmax(-1)).sum())
        judged += len(calls)
        violation = max([violation, *watch.violation.values()])
        differing += watch.differing
    print(
        f"\n{judged} logit rows within {worst:.2g} of the largest logit, {greedy} greedy tokens equal; "
        f"{differing} rows of a layer kept another set than transformers, the worst key by {violation:.2g} of a score; "
        f"{held} bytes on the device from token {PROMPT} to {TOKENS}"
    )
    assert violation < 1e-5 and worst < 1e-4 and greedy == judged
