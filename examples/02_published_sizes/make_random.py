"""Random-weight checkpoints of the published Doge sizes: same shapes, no training, no download.

    python make_random.py 20M /tmp/doge-20m

Sizes from the SmallDoge training recipes. `A` is drawn from N(0, 1), so that scores differ; norm and residual weights
are 1 + 0.1 N(0, 1); everything else as transformers initialises it.
"""

from pathlib import Path
from typing import Any

import click
import torch
from transformers import DogeConfig, DogeForCausalLM

BODIES: dict[str, dict[str, int]] = {
    name: {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
    }
    for name, hidden, layers, heads in (
        ("20M", 256, 8, 2),
        ("60M", 512, 16, 4),
        ("160M", 768, 24, 6),
        ("320M", 1024, 32, 8),
    )
}

EXPERTS = {"20M-MoE": ("20M", 1024, 16), "120M-MoE": ("60M", 4096, 32), "480M-MoE": ("160M", 9216, 48)}
"""Name: the dense body, experts, experts per token."""

SIZES = [*BODIES, *EXPERTS]


def make_config(size: str, **changes: Any) -> DogeConfig:
    """The config of a published size; `changes` go on top."""
    body, experts, per_token = EXPERTS.get(size, (size, 0, 0))
    mixture = {"is_moe": True, "num_experts": experts, "num_experts_per_tok": per_token} if experts else {}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
    common = {
        "vocab_size": 32768,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return DogeConfig(**{**common, **BODIES[body], **mixture, **changes})


def make_model(config: DogeConfig, seed: int) -> DogeForCausalLM:
    """A model with every parameter random."""
    torch.manual_seed(seed)
    model = DogeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):
                parameter.normal_()
            elif "norm" in name or "residual" in name:
                parameter.normal_(1.0, 0.1)
    return model.eval()


@click.command()
@click.argument("size", type=click.Choice(SIZES))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--window", type=click.IntRange(min=1), help="keep_window_size; the recipes leave it at 2048.")
@click.option("--length", type=click.IntRange(min=1), help="Longest text; the recipes have 2048.")
@click.option("--experts", type=(click.IntRange(min=1), click.IntRange(min=1)), metavar="E K", help="Of a mixture.")
def main(
    size: str,
    output: Path,
    dtype: str,
    seed: int,
    window: int | None,
    length: int | None,
    experts: tuple[int, int] | None,
) -> None:
    """Write a random checkpoint of SIZE to OUTPUT."""
    changes: dict[str, Any] = {}
    if window:
        changes["keep_window_size"] = window
    if length:
        rope = {
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": length,
        }
        changes |= {"max_position_embeddings": length, "rope_parameters": rope}
    if experts:
        changes |= {"is_moe": True, "num_experts": experts[0], "num_experts_per_tok": experts[1]}
    config = make_config(size, **changes)
    model = make_model(config, seed).to(getattr(torch, dtype))
    model.save_pretrained(output)
    click.echo(f"{output}: {size}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
