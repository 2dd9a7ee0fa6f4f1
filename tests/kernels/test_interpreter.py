"""The interpreter's repairs, and whether they are still needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which exists for Linux only")

from doge_deploy.kernels.interpreter import round_to_bfloat16, widen_bfloat16

PROBE = """
import torch, triton
import triton.language as tl
@triton.jit
def convert(source, target):
    at = tl.arange(0, 16)
    tl.store(target + at, tl.load(source + at).to(tl.bfloat16))
@triton.jit
def dot(a, b, target):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(target + at, tl.dot(tl.load(a + at), tl.load(b + at)))
x = torch.linspace(1, 1.02, 16)
y = torch.empty(16, dtype=torch.bfloat16)
convert[(1,)](x, y)
a, c = torch.ones(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
dot[(1,)](a, a, c)
print(torch.equal(y, x.bfloat16()), bool((c == 16).all()))
"""


def test_rounding_is_that_of_pytorch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:4] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF7FFFFF]  # ties to even both ways, overflow to infinity
    values = bits.view(np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    found = widen_bfloat16(round_to_bfloat16(values))
    np.testing.assert_array_equal(found, expected)


def test_the_repairs_are_still_needed(tmp_path: Path) -> None:
    """If this fails, Triton has mended its interpreter: delete doge_deploy/kernels/interpreter.py."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    output = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.split() == ["False", "False"]
