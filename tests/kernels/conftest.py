"""How many shapes hypothesis draws for the kernels."""

from __future__ import annotations

import os

from hypothesis import settings

# `nox -s kernels` sets it and draws many shapes
settings.register_profile("kernels", max_examples=200 if os.environ.get("DOGE_KERNEL_SWEEP") else 10, deadline=None)
