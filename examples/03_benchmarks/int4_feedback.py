"""What int4 loses on some texts, chosen with and without the tool's calibration text.

    python int4_feedback.py [MODEL ...] --text FILE [--text FILE ...] [--tokens 2100]

MODEL is doge-tiny and doge-tiny-moe where none is named. Of every text so many tokens are run in rows of 256. Prints
per text the mean KL divergence of transformers with the dequantized weights from transformers with the checkpoint's
own: fp16 as `export` stores it, and fp32, whose scales may have either sign, by blocks. Feedback in fp32 is not what
`export` does; it is measured here for decision 44.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch

from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.tokenizer import encode
from doge_deploy.graph.covariances import input_covariances
from doge_deploy.graph.weight_formats import _feedback
from doge_deploy.graph.weight_formats.int4 import Format
from doge_deploy.text.calibration import CALIBRATION
from doge_deploy.verify.reference import Reference

ROW = 256

Change = Callable[[str, torch.Tensor], torch.Tensor]


def either_sign(left: torch.Tensor, upper: torch.Tensor, _dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_feedback._round_block`, with scales of either sign and of all bits of float32."""
    largest = left.gather(-1, left.abs().argmax(-1, keepdim=True))[:, 0]
    scale = largest / -8 * torch.tensor(_feedback.STARTS, dtype=torch.float64)[:, None]
    scale = torch.where(scale.abs() < 1e-30, 1.0, scale).float().double()
    seen = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=torch.float64), upper=True)
    target, found = left @ seen, []
    for _ in range(2):
        values, loss = _feedback._round_columns(left, scale, upper)
        found.append((loss, values, scale))
        weighed = values @ seen
        fitted = (weighed * target).sum(-1) / weighed.square().sum(-1)
        scale = torch.where(fitted.isfinite() & (fitted != 0), fitted, scale).float().double()
    losses, numbers, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    best, rows = losses.argmin(0), torch.arange(len(left))
    return numbers[best, rows], scales[best, rows]


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


def changes(covariances: dict[str, torch.Tensor]) -> dict[str, Change]:
    """What is compared, by name."""
    half = Format(dtype="fp16")

    def with_text(name: str, weight: torch.Tensor) -> torch.Tensor:
        parts = half.store_by(weight, covariances[name]) if name in covariances else half.store(weight)
        block = weight.shape[1] // parts["scale"].shape[1]
        return parts["values"].float() * parts["scale"].float().repeat_interleave(block, 1)

    found: dict[str, Change] = {
        "fp16 without a text": lambda name, weight: half.dequantized(weight, name),
        "fp16": with_text,
    }
    for size in (32, 64, 128):
        wide = Format(dtype="fp32", block_size=size)

        def fed_back(name: str, weight: torch.Tensor, wide: Format = wide) -> torch.Tensor:
            if name not in covariances:
                return wide.dequantized(weight, name)
            own, _feedback._round_block = _feedback._round_block, either_sign
            block = wide._known_block(weight.shape[1])
            values, scale = _feedback.scales_with_feedback(weight, covariances[name], block, "float32")
            _feedback._round_block = own
            return values * scale.repeat_interleave(block, 1)

        found[f"fp32 block {size}"] = lambda name, weight, wide=wide: wide.dequantized(weight, name)  # type: ignore[misc]
        found[f"fp32 block {size}, feedback"] = fed_back
    return found


@click.command()
@click.argument("models", nargs=-1)
@click.option("--text", "texts", type=click.Path(exists=True, path_type=Path), multiple=True, required=True)
@click.option("--tokens", default=2100, show_default=True)
def main(models: tuple[str, ...], texts: tuple[Path, ...], tokens: int) -> None:
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
        for label, change in changes(covariances).items():
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
