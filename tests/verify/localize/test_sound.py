"""On a sound bundle there is nothing to find, whatever the case, and looking for it takes little more memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle, shared_bundle
from random_doge import SMALL_MOE, save_random_doge, shared_doge
from sweeps import cases

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.verify.live import LiveOracle
from doge_deploy.verify.localize.run import localize
from doge_deploy.verify.source import open_reference

BUNDLES: dict[str, tuple[str | dict[str, Any], dict[str, Any]]] = {
    "dense": ("doge-tiny", {"kv_cache": ("static", "growing")}),
    "int8": ("doge-tiny", {"quantize": "int8"}),
    "fp16": ("doge-tiny", {"dtype": "fp16"}),
    "bf16": ("doge-tiny", {"dtype": "bf16"}),
    "mixture": ("doge-tiny-moe", {"kv_cache": ("static", "growing")}),
    "mixture-per-token": ("doge-tiny-moe", {"routing": "per-token", "kv_cache": ("static", "growing")}),
    "sliding": ({"sliding_window": 6}, {"kv_cache": ("static", "growing")}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "small-mixture": (SMALL_MOE, {"quantize": "int4", "block_size": 16}),
    "features": ({"task": "features"}, {"task": "features"}),
    "classes": ({"task": "sequence-classification"}, {"task": "sequence-classification"}),
}


@pytest.mark.parametrize(("model", "options"), cases(BUNDLES, always=[]))
def test_nothing_is_found_in_a_sound_bundle(model: str | dict[str, Any], options: dict[str, Any]) -> None:
    source: str | Path = model if isinstance(model, str) else shared_doge(**model)
    path = shared_bundle(source, **options)
    bundle = open_bundle(path)
    names = LiveOracle(bundle, open_reference(bundle, str(source))).case_names()
    for layout in bundle.manifest.layouts:
        for name in names:
            found = localize(path, f"{layout}/{name}", reference=str(source), greedy_steps=8)
            assert found.passed, "\n".join(found.lines())


DOGE_20M: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "keep_window_size": 2048,
}


def peak(*arguments: str) -> int:
    """Most memory of a process of its own, in KiB."""
    code = (
        "import resource, sys\nfrom doge_deploy.cli.main import run_command\n"
        f"assert run_command({list(arguments)!r}) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.sweep
@pytest.mark.parametrize("size", ["doge-tiny", "20M"])
def test_peak_memory_is_at_most_half_again_that_of_verify(size: str, tmp_path: Path) -> None:
    """`pytest -s` shows the figures, in MiB."""
    source = size if size == "doge-tiny" else str(save_random_doge(tmp_path / "20M", **DOGE_20M))
    bundle = str(make_bundle(source, tmp_path / "bundle"))
    verify = ["verify", bundle, "--reference", source, "--greedy-steps", "8"]
    case = "natural text" if size == "doge-tiny" else "prefill"
    of_verify, of_localize = peak(*verify), peak(*verify, "--localize", "--case", case)
    sys.stdout.write(f"{size}: verify {of_verify >> 10}, --localize {of_localize >> 10}\n")
    assert of_localize <= 1.5 * of_verify
