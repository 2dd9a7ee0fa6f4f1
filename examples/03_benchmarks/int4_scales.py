"""What int4 loses by block size and by how the scales of blocks are chosen.

    python int4_scales.py [--dtype fp32] [--block 32] [--text FILE] [MODEL ...]

MODEL is doge-tiny and doge-tiny-moe where none is named. With `--text`, divergence and perplexity are those of that
text in place of the 256 tokens of `verify`.

In fp32 a scale may have either sign: the seven ranges that `export` tries, against scales of least squared error (each
of many ranges of a block is the start of a few rounds: numbers for the scale, then the scale that is best for those
numbers). In half precision scales are positive: what `export` chooses on a text, against the least squared error that
it takes without one, the scale of the largest number and the seven ranges. Prints the error of the weights (root of the
mean square, over that of the weights), and mean KL and perplexity of `verify`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import click
import torch

import doge_deploy
from doge_deploy.graph.weight_formats import _scales
from doge_deploy.graph.weight_formats._base import as_array
from doge_deploy.graph.weight_formats.int4 import Format
from doge_deploy.options.export import ExportOptions
from doge_deploy.verify import live

BLOCKS = (32, 64, 128)
STARTS, ROUNDS = torch.linspace(1.05, 0.55, 21).tolist(), 4

Store = Callable[[Format, torch.Tensor, str], dict[str, torch.Tensor]]


def least_squares(self: Format, weight: torch.Tensor, _name: str = "") -> dict[str, torch.Tensor]:
    """As `Format.store`, symmetric, scales of either sign."""
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


def positive(starts: tuple[float, ...]) -> Store:
    """Positive scales: of some fractions of a block's range that of the smallest error, as it is."""

    def store(self: Format, weight: torch.Tensor, _name: str = "") -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        block = self.block(columns)
        blocks = weight.float().reshape(rows, columns // block, block)
        whole = blocks.abs().amax(-1, keepdim=True) / _scales.HIGHEST
        found: list[list[torch.Tensor]] = []
        for start in starts:
            scale = _scales.short_scale(whole * start, self.dtype)
            values = torch.clamp(torch.round(blocks / scale), _scales.LOWEST, _scales.HIGHEST)
            error = (values * scale - blocks).square().sum(-1, keepdim=True)
            found.append([error, values, scale])
        chosen = torch.stack([error for error, _, _ in found]).argmin(0, keepdim=True)
        values = torch.stack([values for _, values, _ in found]).gather(0, chosen.expand(1, *blocks.shape))[0]
        scale = torch.stack([scale for _, _, scale in found]).gather(0, chosen)[0]
        return {
            "values": values.reshape(rows, columns).to(torch.int8),
            "scale": scale.squeeze(-1).to(getattr(torch, self.dtype)),
        }

    return store


def measure(model: str, block: int, dtype: Any, store: Store) -> str:
    errors = []

    def watched(self: Format, weight: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        parts = store(self, weight, name)
        stored = torch.from_numpy(self.dequantize({key: as_array(part) for key, part in parts.items()}))
        errors.append([float((stored - weight).square().sum()), float(weight.square().sum())])
        return parts

    Format.numbers = watched
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        doge_deploy.export(model, bundle, ExportOptions(quantize="int4", block_size=block, dtype=dtype))
        (quality,) = doge_deploy.verify(bundle, greedy_steps=1).quality
    error, size = map(sum, zip(*errors, strict=True))
    return f"error {math.sqrt(error / size):.4f}, KL {quality.mean_kl:.4f}, perplexity {quality.perplexity:.2f}"


@click.command()
@click.argument("models", nargs=-1)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--block", "blocks", type=int, multiple=True, default=BLOCKS, show_default=True)
@click.option("--text", type=click.File(encoding="utf-8"))
def main(models: tuple[str, ...], dtype: str, blocks: tuple[int, ...], text: TextIO | None) -> None:
    """Measure MODELS."""
    if text is not None:
        live.HELD_OUT = text.read()
    stores: dict[str, Store] = {"export": Format.numbers}
    if dtype == "fp32":
        stores["least squares"] = least_squares
    else:
        stores["least squares, no text"] = Format.store
        stores |= {"largest number": positive((1.0,)), "seven ranges": positive(Format.shrink)}
    for model in models or ("doge-tiny", "doge-tiny-moe"):
        for block in blocks:
            for name, store in stores.items():
                print(f"{model} block {block}, {name}: {measure(model, block, dtype, store)}", flush=True)


if __name__ == "__main__":
    main()
