"""Standard operators that must trace to exactly one ONNX node each.

Each is a `torch.library` custom operator with an eager body, so that the traced model can also be run in PyTorch
and compared with transformers without any ONNX in between. `graph/trace.py` maps them to nodes of opset 24.
Reference: https://onnx.ai/onnx/operators/ for the ONNX semantics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from doge_deploy.config.keys import TRAINED_ACTIVATIONS


@torch.library.custom_op("doge::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNormalization over the last axis: float32 statistics (float64 of float64), cast back, then the weight.

    `x` is `[..., C]` in any float dtype, `weight` `[C]` in the same one; returns `x`'s shape and dtype.
    Reference: `DogeRMSNorm` in transformers' modeling_doge.py.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("doge::rotary_embedding", mutates_args=())
def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RotaryEmbedding, rotate-half form: `x` `[B, H, Q, D]`, `cos` and `sin` `[B, Q, D/2]` in `x`'s dtype.

    The two halves of transformers' tables are equal, so only one of them is carried.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@rotary_embedding.register_fake
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("doge::tensor_scatter", mutates_args=())
def tensor_scatter(cache: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    """TensorScatter: a copy of `cache` `[B, Hkv, L, D]` with `update` `[B, Hkv, Q, D]` at rows `write_indices[b] +
    0..Q-1`.

    `write_indices` is `[B]` int64. A runtime may write in place.
    """
    rows = write_indices[:, None] + torch.arange(update.shape[2], device=cache.device)
    index = rows[:, None, :, None].expand(update.shape)
    return cache.scatter(2, index, update)


@tensor_scatter.register_fake
def _(cache: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("doge::split_heads", mutates_args=())
def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reshape to heads without moving them: `[B, Q, H*D]` -> `[B, Q, H, D]` (an ONNX Reshape of constant shape)."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).clone()


@split_heads.register_fake
def _(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], num_heads, x.shape[-1] // num_heads))


@torch.library.custom_op("doge::merge_heads", mutates_args=())
def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `split_heads`: `[B, Q, H, D]` -> `[B, Q, H*D]`."""
    return x.flatten(-2).clone()


@merge_heads.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-2], x.shape[-2] * x.shape[-1]))


@torch.library.custom_op("doge::row_positions", mutates_args=())
def row_positions(first_slot: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Slot of every new token: `first_slot` `[B]` int64, `input_ids` `[B, Q]` -> `[B, Q]`, `first_slot[b] + q`."""
    return first_slot[:, None] + torch.arange(input_ids.shape[1], device=first_slot.device)


@row_positions.register_fake
def _(first_slot: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(input_ids)


@torch.library.custom_op("doge::past_slots", mutates_args=())
def past_slots(input_ids: torch.Tensor, past_key: torch.Tensor) -> torch.Tensor:
    """P for every row: `input_ids` `[B, Q]`, `past_key` `[B, Hkv, P, D]` -> `[B]` int64."""
    return torch.full_like(input_ids[:, 0], past_key.shape[2])


@past_slots.register_fake
def _(input_ids: torch.Tensor, past_key: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(input_ids[:, 0])


@torch.library.custom_op("doge::last_token", mutates_args=())
def last_token(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """State of each row's last real token: `x` `[B, Q, C]`, `lengths` `[B]` int64 in 1..Q -> `[B, 1, C]`."""
    return x[torch.arange(x.shape[0], device=x.device), lengths - 1][:, None]


@last_token.register_fake
def _(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], 1, x.shape[2]))


@torch.library.custom_op("doge::last_unlike", mutates_args=())
def last_unlike(x: torch.Tensor, input_ids: torch.Tensor, pad: int) -> torch.Tensor:
    """State of each row's rightmost token that is not `pad`, of its first token where all are.

    `x` `[B, Q, C]`, `input_ids` `[B, Q]` -> `[B, 1, C]`.
    Reference: `GenericForSequenceClassification.forward` in transformers' modeling_layers.py.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    index = (columns * (input_ids != pad)).amax(dim=1)
    return x[torch.arange(x.shape[0], device=x.device), index][:, None]


@last_unlike.register_fake
def _(x: torch.Tensor, input_ids: torch.Tensor, pad: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], 1, x.shape[2]))


@torch.library.custom_op("doge::no_past", mutates_args=())
def no_past(input_ids: torch.Tensor) -> torch.Tensor:
    """The first slot of rows that hold nothing: `input_ids` `[B, Q]` -> `[B]` int64 zeros."""
    return torch.zeros_like(input_ids[:, 0])


@no_past.register_fake
def _(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(input_ids[:, 0])


def activate(x: torch.Tensor, name: str, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The activation that transformers calls `name` (`ACT2FN`), by its own module.

    `x` is of any shape and float dtype, `weights` in the order of `TRAINED_ACTIVATIONS`, none for most activations.
    """
    from transformers.activations import ACT2FN  # seconds, and a trace does not compute

    if not weights:
        result: torch.Tensor = ACT2FN[name](x)
    else:
        named = dict(zip(TRAINED_ACTIVATIONS[name], weights, strict=True))
        result = torch.func.functional_call(ACT2FN[name], named, x)
    return result


@torch.library.custom_op("doge::activation", mutates_args=())
def activation(x: torch.Tensor, weights: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """See `activate`."""
    result = activate(x, name, weights)
    return result.clone() if result is x else result  # "linear": an operator must not return its input


@activation.register_fake
def _(x: torch.Tensor, weights: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("doge::last_slots", mutates_args=())
def last_slots(x: torch.Tensor, count: int) -> torch.Tensor:
    """What a sliding cache keeps: the last `count` slots of `x` `[B, Hkv, K, D]`, all where it has fewer."""
    return x[:, :, -count:].clone()


@last_slots.register_fake
def _(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:2], torch.sym_min(x.shape[2], count), x.shape[3]))  # type: ignore[no-untyped-call]


@torch.library.custom_op("doge::mask_of_slots", mutates_args=())
def mask_of_slots(attention_mask: torch.Tensor, input_ids: torch.Tensor, past_key: torch.Tensor) -> torch.Tensor:
    """The columns of a mask of all tokens so far that a sliding cache still has slots for.

    `attention_mask` `[B, T]`, `input_ids` `[B, Q]`, `past_key` `[B, Hkv, P, D]` -> `[B, P + Q]`, the last columns.
    """
    return attention_mask[:, attention_mask.shape[1] - past_key.shape[2] - input_ids.shape[1] :].clone()


@mask_of_slots.register_fake
def _(attention_mask: torch.Tensor, input_ids: torch.Tensor, past_key: torch.Tensor) -> torch.Tensor:
    return attention_mask.new_empty((attention_mask.shape[0], past_key.shape[2] + input_ids.shape[1]))


@torch.library.custom_op("doge::longest_position", mutates_args=())
def longest_position(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of text that a call reaches, padding included: `[B, Q]` int64 -> `[1]`, the largest position plus one."""
    return position_ids.amax().reshape(1) + 1


@longest_position.register_fake
def _(position_ids: torch.Tensor) -> torch.Tensor:
    return position_ids.new_empty(1)
