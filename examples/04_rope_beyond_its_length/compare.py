"""Greedy text far beyond the original length of RoPE type `dynamic`, in a bundle and in transformers.

    python compare.py CHECKPOINT BUNDLE

Both sides get the same calls, each a fresh model: the prompt in one call and then token by token; the prompt in chunks;
and the whole text in chunks that cross the original length. Exit code 1 if a token differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from transformers import DogeForCausalLM, DynamicCache

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.runtime.ort import open_runner

Model = Callable[[Sequence[int]], np.ndarray]
"""Feeds the next tokens of a text and returns the logits `[V]` of the last."""


def of_bundle(bundle: Bundle, layout: str) -> Model:
    """A fresh text in one layout of a bundle."""
    runner = open_runner(bundle, layout)
    runner.reset(1)
    return lambda ids: runner.run(np.array([ids]))[0, -1].astype(np.float64)


def of_transformers(path: Path) -> Model:
    """A fresh text in a fresh model: what RoPE remembers is part of the module."""
    model = DogeForCausalLM.from_pretrained(path, attn_implementation="eager", dtype="auto").eval()
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def feed(ids: Sequence[int]) -> np.ndarray:
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1].double().numpy()

    return feed


def feed_chunks(model: Model, ids: Sequence[int], size: int) -> list[np.ndarray]:
    """Logits of the last token of each chunk."""
    return [model(ids[start : start + size]) for start in range(0, len(ids), size)]


def greedy(model: Model, prompt: Sequence[int], steps: int, chunk: int) -> tuple[list[int], np.ndarray]:
    """`steps` tokens, and the logits `[steps, V]` that they were chosen by."""
    logits = [feed_chunks(model, prompt, chunk)[-1]]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < steps:
        logits.append(model(tokens[-1:]))
        tokens.append(int(logits[-1].argmax()))
    return tokens, np.stack(logits)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--prompt", default=40, show_default=True, help="Tokens of the prompt, drawn at random.")
@click.option("--steps", default=200, show_default=True, help="Tokens to generate.")
@click.option("--seed", default=0, show_default=True)
def main(checkpoint: Path, bundle: Path, prompt: int, steps: int, seed: int) -> None:
    """Compare BUNDLE with the CHECKPOINT that it was made of."""
    opened = open_bundle(bundle)
    facts = opened.manifest.facts
    click.echo(
        f"rope_type {facts.rope_type}, original length {facts.original_max_position_embeddings}, "
        f"prompt of {prompt} tokens, {steps} generated"
    )
    ids = np.random.default_rng(seed).integers(0, facts.vocab_size, prompt).tolist()
    wrong = 0
    texts = []
    for chunk in (prompt, 16):
        expected, logits = greedy(of_transformers(checkpoint), ids, steps, chunk)
        texts.append(expected)
        for layout in opened.manifest.layouts:
            tokens, own = greedy(of_bundle(opened, layout), ids, steps, chunk)
            equal = sum(a == b for a, b in zip(tokens, expected, strict=True))
            wrong += steps - equal
            click.echo(
                f"{layout}, prompt in chunks of {chunk}, then token by token: {equal} of {steps} tokens equal, "
                f"logits max |d| {np.abs(own - logits).max():.1e} of {np.abs(logits).max():.1f}"
            )
    text = [*ids, *texts[0]]
    for size in (7, 48):
        reference = np.stack(feed_chunks(of_transformers(checkpoint), text, size))
        for layout in opened.manifest.layouts:
            own = np.stack(feed_chunks(of_bundle(opened, layout), text, size))
            equal = int((own.argmax(1) == reference.argmax(1)).sum())
            wrong += len(own) - equal
            click.echo(
                f"{layout}, all {len(text)} tokens in chunks of {size}: {equal} of {len(own)} next tokens equal, "
                f"logits max |d| {np.abs(own - reference).max():.1e} of {np.abs(reference).max():.1f}"
            )
    once = of_transformers(checkpoint)(text)
    again = feed_chunks(of_transformers(checkpoint), text, 1)[-1]
    click.echo(
        f"transformers against itself, one call or token by token: logits max |d| {np.abs(once - again).max():.1e}"
    )
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
