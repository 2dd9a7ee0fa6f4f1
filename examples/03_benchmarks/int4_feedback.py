"""What int4 loses on some texts, its numbers chosen with and without the tool's calibration text.

    python int4_feedback.py [MODEL ...] --text FILE [--text FILE ...] [--tokens 2100] [--block 32 ...]

MODEL is doge-tiny and doge-tiny-moe where none is named. Of every text so many tokens are run in rows of 256. Prints
per text the mean KL divergence of transformers with the dequantized weights from transformers with the checkpoint's
own: fp16 and fp32, by block sizes, and fp32 with zero points. Decisions 44 and 52 have what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.tokenizer import encode
from doge_deploy.graph.covariances import input_covariances
from doge_deploy.graph.weight_formats._base import as_array
from doge_deploy.graph.weight_formats.int4 import Format
from doge_deploy.text.calibration import CALIBRATION
from doge_deploy.verify.reference import Reference

ROW = 256

Change = Callable[[str, torch.Tensor], torch.Tensor]


@torch.no_grad()
def divergence(model: torch.nn.Module, rows: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    total = sum(
        float((known.exp() * (known - found)).sum())
        for known, found in zip(expected, log_probabilities(model, rows), strict=True)
    )
    return total / sum(map(len, expected))


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.log_softmax(model(row).logits[0].double(), -1) for row in rows]


def changes(covariances: dict[str, torch.Tensor], blocks: Sequence[int]) -> dict[str, Change]:
    """What is compared, by name."""

    def stored(**options: Any) -> Change:
        form = Format(**options)

        def change(name: str, weight: torch.Tensor) -> torch.Tensor:
            if not form.uses_covariances or name not in covariances:
                return form.dequantized(weight)
            parts = form.store_by(weight, covariances[name], name)
            return torch.from_numpy(form.dequantize({key: as_array(part) for key, part in parts.items()}))

        return change

    found: dict[str, Change] = {}
    for block in blocks:
        for dtype, symmetric in (("fp16", True), ("fp32", True), ("fp32", False)):
            for calibrate in (False, True):
                name = (
                    f"{dtype} block {block}{'' if symmetric else ', zero points'}{', calibrated' if calibrate else ''}"
                )
                found[name] = stored(dtype=dtype, block_size=block, symmetric=symmetric, calibrate=calibrate)
    return found


@click.command()
@click.argument("models", nargs=-1)
@click.option("--text", "texts", type=click.Path(exists=True, path_type=Path), multiple=True, required=True)
@click.option("--tokens", default=2100, show_default=True)
@click.option("--block", "blocks", type=int, multiple=True, default=(32, 64, 128), show_default=True)
def main(models: tuple[str, ...], texts: tuple[Path, ...], tokens: int, blocks: tuple[int, ...]) -> None:
    """Measure MODELS on texts."""
    for name in models or ("doge-tiny", "doge-tiny-moe"):
        checkpoint = open_checkpoint(name)
        model = Reference(checkpoint, "float32").model
        rows, expected = {}, {}
        for text in texts:
            ids = (encode(checkpoint, text.read_text(encoding="utf-8")) or [])[:tokens]
            rows[text] = [torch.tensor([list(ids[at : at + ROW])]) for at in range(0, len(ids) - ROW + 1, ROW)]
            expected[text] = log_probabilities(model, rows[text])
        covariances: dict[str, torch.Tensor] = {}
        calibration = encode(checkpoint, CALIBRATION) or []
        for layer in input_covariances(checkpoint, calibration, routing="reference", max_length=512):
            covariances |= layer
        parameters = {key: value for key, value in model.named_parameters() if value.ndim == 2}
        own = {key: value.detach().clone() for key, value in parameters.items()}
        for label, change in changes(covariances, blocks).items():
            with torch.no_grad():
                for key, weight in own.items():
                    if not Format(dtype="fp16").refusal(key, weight.shape):
                        parameters[key].copy_(change(key, weight))
            found = [f"{divergence(model, rows[text], expected[text]):.4f}" for text in texts]
            print(f"{name}, {label}: {', '.join(found)}", flush=True)
            with torch.no_grad():
                for key, weight in own.items():
                    parameters[key].copy_(weight)


if __name__ == "__main__":
    main()
