"""What int4 loses by block size, with the scales that export chooses and with scales of least squared error.

    python int4_scales.py [MODEL ...]        # doge-tiny and doge-tiny-moe where none is named

For least squares each of many ranges of a block is the start of a few rounds: numbers for the scale, then the scale
that is best for those numbers. Prints the error of the weights (root of the mean square, over that of the weights), and
mean KL and perplexity of `verify`.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import doge_deploy
from doge_deploy.graph.weight_formats.int4 import Format
from doge_deploy.options.export import ExportOptions

BLOCKS = (32, 64, 128)
STARTS, ROUNDS = torch.linspace(1.05, 0.55, 21).tolist(), 4

Store = Callable[[Format, torch.Tensor], dict[str, torch.Tensor]]


def least_squares(self: Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As `Format.store`, symmetric."""
    rows, columns = weight.shape
    block = self.block(columns)
    blocks = weight.float().reshape(rows, columns // block, block)
    best: list[torch.Tensor] = []
    for start in STARTS:
        scale, zero = self._range(blocks, start)
        for _ in range(ROUNDS):
            levels = torch.clamp(torch.round(blocks / scale) + zero, 0, self.levels - 1) - zero
            error = (levels * scale - blocks).square().sum(-1, keepdim=True)
            found = [error, levels + zero, scale]
            better = error < (best or found)[0]
            best = [torch.where(better, new, old) for new, old in zip(found, best or found, strict=True)]
            fitted = (levels * blocks).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
            scale = torch.where(fitted.isfinite() & (fitted != 0), fitted, scale)
    values = best[1].reshape(rows, columns).to(torch.uint8)
    return {"values": values, "scale": best[2].squeeze(-1)}


def measure(model: str, block: int, store: Store) -> str:
    errors = []

    def watched(self: Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = store(self, weight)
        stored = torch.from_numpy(self.dequantize({key: part.numpy() for key, part in parts.items()}))
        errors.append([float((stored - weight).square().sum()), float(weight.square().sum())])
        return parts

    Format.store = watched
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        doge_deploy.export(model, bundle, ExportOptions(quantize="int4", block_size=block))
        (quality,) = doge_deploy.verify(bundle, greedy_steps=1).quality
    error, size = map(sum, zip(*errors, strict=True))
    return f"error {math.sqrt(error / size):.4f}, KL {quality.mean_kl:.4f}, perplexity {quality.perplexity:.2f}"


def main(models: list[str]) -> None:
    chosen = Format.store
    for model in models:
        for block in BLOCKS:
            for name, store in (("export", chosen), ("least squares", least_squares)):
                print(f"{model} block {block}, {name}: {measure(model, block, store)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["doge-tiny", "doge-tiny-moe"])
