"""A whole model with its operators run as kernels, in the interpreter, against the bundle in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle

pytest.importorskip("triton", reason="kernels need Triton, which exists for Linux only")

from doge_deploy.bundle import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.errors import UsageError
from doge_deploy.runtime.ort import open_runner
from doge_deploy.verify.torch_kernels import TorchKernelsRunner

CHUNKS = [7, 1, 1, 1, 12, 2]
"""Tokens of each call: below, at and above the window of 8, by both chains."""


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_whole_model_by_kernels(model: str, dense_doge: Path, moe_doge: Path, tmp_path: Path) -> None:
    source = dense_doge if model == "dense" else moe_doge
    bundle = open_bundle(make_bundle(source, tmp_path / "bundle", logits="all"))
    expected, found = open_runner(bundle), TorchKernelsRunner(bundle, open_checkpoint(str(source)))
    expected.reset(1)
    found.reset(1)
    ids = np.random.default_rng(0).permutation(np.arange(3, 64))
    start = 0
    for width in CHUNKS:
        chunk = ids[None, start : start + width]
        np.testing.assert_allclose(found.run(chunk), expected.run(chunk), rtol=0, atol=2e-5)
        start += width
    caches = expected.cache()
    for name, rows in found.cache().items():
        np.testing.assert_allclose(rows[0], caches[name][0], rtol=0, atol=2e-5)
    kinds = {name.split(".")[0] for name in found.extra}
    assert kinds == ({"kept"} if model == "dense" else {"kept", "experts"})
    assert found.extra["kept.1"].sum(-1).max() == bundle.manifest.facts.keep_window_size


def test_without_a_static_layout_it_is_said(dense_doge: Path, tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(dense_doge, tmp_path / "bundle", kv_cache=("growing",)))
    with pytest.raises(UsageError, match="has no static layout"):
        TorchKernelsRunner(bundle, open_checkpoint(str(dense_doge)))
