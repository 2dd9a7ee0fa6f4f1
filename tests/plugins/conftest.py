"""Kernels on the CPU: Triton decides when it is imported whether it interprets, so this comes first.

`make test-gpu` sets TRITON_INTERPRET=0 and runs the tests that are marked `gpu` on the device.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")

# `nox -s kernels` sets it and draws many shapes
settings.register_profile("kernels", max_examples=200 if os.environ.get("DOGE_KERNEL_SWEEP") else 10, deadline=None)
