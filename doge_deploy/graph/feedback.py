"""The numbers of weights in few bits, chosen on a text for the least error of the products that they are in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from doge_deploy.bundle.files import CALIBRATION_TOKENS
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.errors import BrokenBundleError
from doge_deploy.graph.covariances import input_covariances
from doge_deploy.graph.weight_formats import WeightFormat

MOST_TOKENS = 8192
"""Tokens of a text that are used; what follows is left out."""

Chosen = dict[str, dict[str, torch.Tensor]]


def choose_numbers(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    weight_format: WeightFormat,
    *,
    routing: str,
    max_length: int,
    advance: Callable[[int], None] = lambda layers: None,
) -> Chosen:
    """By name of a weight what `weight_format` stores for it: linear layers, and the head.

    A tied head is the embedding too; another embedding, and tables of experts, are left to `store`: rows are looked up,
    and what the rows of the chosen experts are multiplied with is one number each, or gained nothing (decision 44).
    The whole result is held in memory, 8 bits a number; of the model one layer at a time.

    Args:
        checkpoint: a language model.
        ids: of the text.
        weight_format: one that uses covariances.
        routing: of a mixture, as in the bundle.
        max_length: slots of a row of the bundle.
        advance: told of each layer, and of the head.
    """
    chosen: Chosen = {}
    for covariances in input_covariances(checkpoint, ids, routing=routing, max_length=max_length):
        for name, covariance in covariances.items():
            if not weight_format.refusal(name, checkpoint.tensors[name].shape):
                chosen[name] = weight_format.store_by(checkpoint.read(name), covariance, name)
        advance(1)
    return chosen


def write_tokens(directory: Path, ids: Sequence[int]) -> None:
    """Put the tokens into a bundle."""
    (directory / CALIBRATION_TOKENS).write_text(json.dumps({"tokens": list(ids)}) + "\n", encoding="utf-8")


def read_tokens(directory: Path, vocab_size: int) -> list[int]:
    """The tokens of a bundle that has them.

    Raises:
        BrokenBundleError: the file holds something else, or tokens that the model does not have.
    """
    file = directory / CALIBRATION_TOKENS
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))["tokens"]
        good = bool(ids) and all(type(token) is int and 0 <= token < vocab_size for token in ids)
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise BrokenBundleError(f'{file}: must be {{"tokens": [...]}} with ids from 0 to {vocab_size - 1}')
    return list(ids)
