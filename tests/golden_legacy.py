"""The golden checkpoints of the original code, see tests/golden/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

DIRECTORY = Path(__file__).parent / "golden" / "legacy"

REVISIONS = {"dense": "2025-08", "moe": "2025-08", "dense-2025-03": "2025-03", "dense-2025-02": "2025-02"}
"""Every golden checkpoint with the revision that it is of."""

TOLERANCE = 1e-4
"""Of logits that span about +-8, and of caches; the original code is within 1.2e-5 of itself in float64."""


class Golden:
    """Inputs and outputs of one checkpoint."""

    def __init__(self, name: str) -> None:
        self.path = DIRECTORY / name
        self.revision = REVISIONS[name]
        self.tensors: dict[str, npt.NDArray[np.float32]] = load_file(self.path / "golden.safetensors")

    def ids(self, text: str) -> npt.NDArray[np.int64]:
        return self.tensors[f"{text}.input_ids"].astype(np.int64)

    @property
    def prefill(self) -> int:
        """Tokens of `b` that come in the first call."""
        return self.tensors["b.prefill.logits"].shape[1]

    def caches(self) -> dict[str, npt.NDArray[np.float32]]:
        """`present.{i}.key|value` `[Hkv, K, D]` after all of `b`."""
        prefix, tensors = "b.cache.", self.tensors
        return {f"present.{name[len(prefix) :]}": tensors[name][0] for name in tensors if name.startswith(prefix)}
