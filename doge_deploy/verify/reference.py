"""The oracle: transformers' DogeForCausalLM in eager mode, watched and, where asked, made to use given selections.

A legacy Doge brings the attention of its own time, see `legacy_reference.py`.

Unless a selection is given, every number comes from transformers' own functions; the hooks around them only look.

Axes: B batch, Q tokens of a call, K cached keys after it, Hkv key/value heads, S heads of the score, N = B*Q,
n router keys, k experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import DogeConfig
from transformers.models.doge.modeling_doge import DogeRMSNorm

from doge_deploy.checkpoint import Checkpoint
from doge_deploy.checkpoint.names import EMBEDDING, HEAD, PREFIX
from doge_deploy.runtime.base import IntArray
from doge_deploy.runtime.padding import left_padded
from doge_deploy.verify.compare import Array
from doge_deploy.verify.legacy_reference import load_legacy_model
from doge_deploy.verify.replay import Selections

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicLayer

SMALL_PARAMETERS = 4_000_000
"""Below this, one thread is faster: an operator is over before a second thread has woken up."""

FEWEST_ROWS = 64
"""Positions of a longer call that get logits where only the last is asked for. So many rows are multiplied as all of
them are, to the bit; one row alone is another product, which errs half as much (decision 8)."""


@dataclass
class Watch:
    """What happened inside one call."""

    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    """Per layer `[B, S, K]`."""
    router: dict[int, torch.Tensor] = field(default_factory=dict)
    """Per layer `[2, N, n]`."""
    classes: list[torch.Tensor] = field(default_factory=list)
    """Of a classification, per row: class logits `[tokens, labels]` of every real token, not of the chosen alone."""
    gap: float = float("inf")
    """Smallest distance, over rows and layers, between the last kept and the first dropped score."""
    violation: dict[str, float] = field(default_factory=dict)
    """Per `kept.<layer>` / `experts.<layer>`: how far a given selection is from being a best one; inf if it is none."""
    differing: int = 0
    """Rows whose given selection is another set than the reference's own."""
    choices: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """Where they are asked for: the reference's own selections, named and shaped as in `Selections`; and which of their
    rows `[B, Q]`, tokens `[N]` of experts, are judged."""
    held: int = 0
    """Columns of the text so far, those included that a sliding cache has lost."""


@dataclass(frozen=True)
class Call:
    """What one call of the reference is told beside its tensors, and where it notes what it sees."""

    given: Selections
    """Selections that are compared with the reference's own."""
    use_given: bool
    """Whether they replace the reference's own."""
    real_rows: torch.Tensor | None
    """`[B, Q]`: the rows in which selections are judged; all where None."""
    longest: int | None
    """RoPE takes the call for a part of one that reaches that many tokens."""
    note_choices: bool = False
    """Whether the reference's own selections are noted."""
    watch: Watch = field(default_factory=Watch)


Weights = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
"""By name of a parameter: from the checkpoint's weight the one that is to take its place, of the same shape."""


class Reference:
    """transformers' model, whose mask and router are watched during a call.

    It does not change: another dtype or other weights are another reference. Only the RoPE of the types that adapt to
    the length of a text remembers it from call to call, as transformers' does, until `forget`.

    Args:
        checkpoint: the weights.
        dtype: NumPy's name of the dtype that is computed in.
        task: what the model is for; with `features` a call returns last hidden states.
        weights: parameters that are to have other values than the checkpoint's.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, task: str = "causal-lm", weights: Weights | None = None
    ) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        # Configs were read strictly by us; transformers' remarks on them are noise here.
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self.task = task
        self.dtype = dtype
        self.facts = checkpoint.facts
        self.model = _load_model(checkpoint, getattr(torch, dtype)).eval()
        self.body = getattr(self.model, "model", self.model)
        """The decoder, with or without a head around it."""
        _replace_weights(self.model, weights or {})
        if dtype == "float64":
            _widen_norms(self.model)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: IntArray,
        attention_mask: Array,
        position_ids: IntArray,
        cache: Any,
        *,
        given: Selections | None = None,
        use_given: bool = True,
        real_rows: Array | None = None,
        longest: int | None = None,
        note_choices: bool = False,
        last: int | None = None,
    ) -> tuple[torch.Tensor, Watch]:
        """One call: `input_ids` and `position_ids` `[B, Q]`, `attention_mask` `[B, T]`, or `[B, 1, Q, K]`, true
        where visible; `cache` is updated. Of a language model logits may be asked of the `last` positions alone. The
        others are fields of `Call`.
        """
        rows = None if real_rows is None else torch.from_numpy(real_rows)
        call = Call(given or {}, use_given, rows, longest, note_choices)
        called = self.body if self.task == "features" else self.model
        kept = {} if last is None or self.task != "causal-lm" else {"logits_to_keep": last}
        with self._watched(call):
            output = called(
                input_ids=torch.from_numpy(np.ascontiguousarray(input_ids)),
                attention_mask=_as_mask(attention_mask),
                position_ids=torch.from_numpy(np.ascontiguousarray(position_ids)),
                past_key_values=cache,
                use_cache=True,
                **kept,
            )
        return output.last_hidden_state if self.task == "features" else output.logits, call.watch

    def forget(self) -> None:
        """Make RoPE forget the texts so far, as if the model had just been loaded."""
        rotary = self.body.rotary_emb
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        rotary.inv_freq = rotary.original_inv_freq.clone()

    @contextmanager
    def _watched(self, call: Call) -> Iterator[None]:
        """While this lasts, the model's functions report to `call` and do what it says."""
        with ExitStack() as stack:

            def around(owner: Any, name: str, hook: Callable[..., Any], *arguments: Any) -> None:
                """Let `owner.name` be `hook(call, *arguments, original, ...)`."""
                setattr(owner, name, partial(hook, call, *arguments, getattr(owner, name)))
                stack.callback(delattr, owner, name)

            around(self.body.rotary_emb, "forward", _rotate)
            for index, layer in enumerate(self.body.layers):
                around(layer.self_attn, "prepare_dynamic_mask", _mask, index)
                if self.facts.is_moe:
                    around(layer.mlp, "forward", _experts, index, layer.mlp)
            if self.task == "sequence-classification":
                noted = self.model.score.register_forward_hook(partial(_note_classes, call))
                stack.callback(noted.remove)
            yield


def _note_classes(call: Call, _module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    call.watch.classes = list(output)


def _rotate(
    call: Call,
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    position_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Around `DogeRotaryEmbedding.forward`: shows it the last position of the whole call too, where it is told."""
    if call.longest is None:
        return original(x, position_ids)
    last = torch.full_like(position_ids[:, :1], call.longest - 1)
    cos, sin = original(x, torch.cat((position_ids, last), dim=1))
    return cos[:, :-1], sin[:, :-1]


def _mask(
    call: Call,
    index: int,
    original: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    dt_states: torch.Tensor,
    keep_window_size: int = 2048,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Around `prepare_dynamic_mask`: records what it kept; a given selection replaces its result."""
    call.watch.scores[index] = dt_states
    if attention_mask is None:
        raise AssertionError("transformers passed no attention mask; its causal mask would be lost")
    mask = original(hidden_states, dt_states, keep_window_size, attention_mask)
    lowest = torch.finfo(hidden_states.dtype).min
    if mask.shape[-1] <= keep_window_size:
        return _for_float32_softmax(mask)
    allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    bias = dt_states[:, :, None, :].masked_fill(~allowed[..., : mask.shape[-1]], lowest)
    visible = bias > lowest
    last = torch.topk(bias, keep_window_size, dim=-1).values.amin(-1, keepdim=True)
    own = mask > lowest
    _note_gap(call, bias, own, last, visible)
    if call.note_choices:
        judged = np.ones(own.shape[:1] + own.shape[2:3], bool) if call.real_rows is None else call.real_rows.numpy()
        call.watch.choices[f"kept.{index}"] = own.numpy(), judged
    used = _choose(call, f"kept.{index}", own, bias, visible, last)
    return _for_float32_softmax(mask if used is own else bias.masked_fill(~used, lowest))


def _choose(
    call: Call, name: str, own: torch.Tensor, bias: torch.Tensor, visible: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """The given selection where there is one, after measuring how far it is from the best; else `own`."""
    if name not in call.given:
        return own
    # A sliding cache has lost the first columns.
    given = torch.from_numpy(call.given[name][..., call.given[name].shape[-1] - own.shape[-1] :])
    real = torch.ones(own.shape[:1] + own.shape[2:3], dtype=torch.bool) if call.real_rows is None else call.real_rows
    rows = real[:, None, :, None]
    too_low = torch.where(given & rows, last - bias, -torch.inf).amax().item()
    too_high = torch.where(~given & visible & rows, bias - last, -torch.inf).amax().item()
    counts = (given & visible).sum(-1) == own.sum(-1)
    legal = not (given & ~visible & rows).any() and bool((counts | ~real[:, None]).all())
    call.watch.violation[name] = max(too_low, too_high, 0.0) if legal else float("inf")
    call.watch.differing += int((((given != own) & rows).any(-1)).sum())
    return torch.where(rows, given, own) if call.use_given else own


def _note_gap(call: Call, bias: torch.Tensor, own: torch.Tensor, last: torch.Tensor, visible: torch.Tensor) -> None:
    dropped = torch.where(visible & ~own, bias, -torch.inf).amax(-1, keepdim=True)
    call.watch.gap = min(call.watch.gap, float((last - dropped).amin()))


def _experts(
    call: Call, index: int, mlp: Any, original: Callable[..., Any], hidden_states: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Around `DogeCDMoE.forward`: records the experts; given ones take their place in the same formula."""
    batch, width, hidden = hidden_states.shape
    tokens = batch * width
    halves = mlp.router_gate(hidden_states).view(2, tokens, -1)
    call.watch.router[index] = halves
    sums = (halves[0][:, :, None] + halves[1][:, None, :]).flatten(1)  # [N, n*n], in the order of expert ids
    best = torch.topk(sums, min(mlp.top_k + 1, sums.shape[1]), dim=-1)
    own, last = best.indices[:, : mlp.top_k], best.values[:, mlp.top_k - 1 : mlp.top_k]
    if best.values.shape[1] > mlp.top_k:
        call.watch.gap = min(call.watch.gap, float((last - best.values[:, mlp.top_k :]).amin()))
    if call.note_choices:
        call.watch.choices[f"experts.{index}"] = own.numpy(), np.ones(tokens, bool)
    used = _choose_experts(call, f"experts.{index}", own, sums, last)
    if used is own:
        result: tuple[torch.Tensor, torch.Tensor] = original(hidden_states, **kwargs)
        return result
    weights = F.softmax(sums.gather(1, used), dim=-1)
    if mlp.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    dots = torch.matmul(mlp.down_embed(used), hidden_states.view(tokens, hidden, 1)).view(tokens, -1)
    gates = mlp.act_fn(dots) * weights
    routed = torch.matmul(gates[:, None], mlp.up_embed(used)).view(batch, width, -1)
    shared = mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden_states)) * mlp.up_proj(hidden_states))
    return shared + routed, halves


def _choose_experts(call: Call, name: str, own: torch.Tensor, sums: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    if name not in call.given:
        return own
    given = torch.from_numpy(np.ascontiguousarray(call.given[name]))
    picked = torch.zeros_like(sums, dtype=torch.bool).scatter(1, given, True)
    too_low = (last - sums.gather(1, given)).amax().item()
    too_high = torch.where(~picked, sums - last, -torch.inf).amax().item()
    legal = bool((picked.sum(1) == own.shape[1]).all())
    call.watch.violation[name] = max(too_low, too_high, 0.0) if legal else float("inf")
    own_picked = torch.zeros_like(picked).scatter(1, own, True)
    call.watch.differing += int((picked != own_picked).any(1).sum())
    return given if call.use_given else own


def _load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The class that the checkpoint was saved from."""
    if checkpoint.facts.is_legacy:
        return load_legacy_model(checkpoint, dtype)
    config = DogeConfig.from_dict({**checkpoint.config, "num_hidden_layers": checkpoint.facts.num_hidden_layers})
    architecture = getattr(transformers, checkpoint.facts.architecture)
    if not checkpoint.as_stored:
        return _with_tensors_read_here(architecture, config, checkpoint, dtype)
    return architecture.from_pretrained(
        checkpoint.path,
        config=config,
        dtype=dtype,
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
    )


def _with_tensors_read_here(architecture: Any, config: DogeConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' model with merged or renamed tensors, which it cannot read itself."""
    model = architecture._from_config(config, dtype=dtype, attn_implementation="eager")
    weights = {name: checkpoint.read(name).to(dtype) for name in checkpoint.tensors}
    if checkpoint.facts.architecture == "DogeModel":
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    elif checkpoint.facts.tie_word_embeddings and checkpoint.facts.num_labels is None:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _as_mask(mask: Array) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(mask))
    return tensor.to(torch.int64) if tensor.ndim == 2 else tensor


def checkpoint_size(checkpoint: Checkpoint) -> int:
    """Number of parameters."""
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


@contextmanager
def few_threads(checkpoint: Checkpoint) -> Iterator[None]:
    """While this lasts, PyTorch computes with one thread if the checkpoint is a small one."""
    before = torch.get_num_threads()
    if checkpoint_size(checkpoint) < SMALL_PARAMETERS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _replace_weights(model: torch.nn.Module, weights: Weights) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in weights.items():
            parameters[name].copy_(change(parameters[name]))


def _widen_norms(model: torch.nn.Module) -> None:
    """RMSNorm in float64, where transformers computes it in float32 whatever the model's dtype.

    Without it the noise of float32 is measured too small: both runs would make the very same rounding errors wherever
    a norm sees the same input, as in layer 0.
    """
    for module in model.modules():
        if isinstance(module, DogeRMSNorm):
            module.forward = partial(_rms_norm, module)  # type: ignore[method-assign]


def _rms_norm(norm: DogeRMSNorm, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))


def _for_float32_softmax(mask: torch.Tensor) -> torch.Tensor:
    """In float64 the lowest number becomes -inf in eager attention's float32 softmax, and a row of padding NaN."""
    return mask.clamp_min(torch.finfo(torch.float32).min) if mask.dtype == torch.float64 else mask


class ReferenceRows:
    """Rows of text in the reference, fed call by call like a `Runner`.

    Args:
        reference: the model.
        batch: rows.
        padding: where the padding of a call with rows of different length goes: "right" (its keys stay as holes that
        later calls do not see: the content of a static cache), "left" (the convention of Hugging Face tools) or
        "masked" (on the right and never seen).
        ragged: some call pads a row on the right. transformers' sliding window would count that padding, a static cache
        does not have it: the window is then given as a mask of slots, on a cache that keeps everything.
        note_choices: note the reference's own selections in `Watch.choices`.
    """

    def __init__(
        self, reference: Reference, batch: int, padding: str, *, ragged: bool = False, note_choices: bool = False
    ) -> None:
        from transformers import DynamicCache

        self.reference = reference
        self.note_choices = note_choices
        self.padding = padding
        self.sliding_by_slot = reference.facts.sliding_window if ragged and padding == "right" else None
        self.cache = DynamicCache() if self.sliding_by_slot else DynamicCache(config=reference.model.config)
        self.real: Array = np.zeros((batch, 0), bool)
        """`[B, T]`: columns so far that hold a real token."""
        reference.forget()

    def run(
        self,
        input_ids: IntArray,
        lengths: IntArray,
        given: Selections | None = None,
        *,
        use_given: bool = True,
        longest: int | None = None,
        last: int | None = None,
    ) -> tuple[list[torch.Tensor], Watch]:
        """Feed one call; returns the logits (or features) `[lengths[b], V]` of each row's real tokens, or class logits
        `[1, labels]`. `longest`: see `Reference`.

        With `last` only those of so many tokens of each row, `[min(last, lengths[b]), V]`.
        """
        width = input_ids.shape[1]
        before = self.real.sum(axis=1)
        if self.padding == "left":
            left = left_padded(input_ids, lengths)
            input_ids, source, rows = left.input_ids, left.source, left.real
            seen = np.concatenate((self.real, rows), axis=1)
        else:
            source = np.broadcast_to(np.arange(width), input_ids.shape)
            rows = source < lengths[:, None]
            if self.padding == "masked" and self.reference.facts.pad_token_id is not None:
                input_ids = np.where(rows, input_ids, self.reference.facts.pad_token_id)
            # Padding sees what is before it, itself and other padding of this call, as in a static cache.
            seen = np.concatenate((self.real, rows if self.padding == "masked" else np.ones_like(rows)), axis=1)
        positions = np.maximum(before[:, None] + source, 0)
        if self.sliding_by_slot:
            seen = self._near_slots(seen, positions, self.sliding_by_slot)
        # What padding selects matters only where its routing mixes with that of real tokens. Padding on the left sees
        # nothing that a selection could be judged by; on the right it sees what is before it.
        matters = self.reference.facts.is_moe if self.padding == "right" else self.padding == "masked"
        judged = None if matters else rows
        logits, watch = self.reference(
            input_ids,
            seen,
            positions,
            self.cache,
            given=given,
            use_given=use_given,
            real_rows=judged,
            longest=longest,
            note_choices=self.note_choices,
            last=None if last is None or not rows[:, -1].all() else max(last, FEWEST_ROWS),
        )
        self.real = np.concatenate((self.real, rows), axis=1)
        watch.held = self.real.shape[1]
        watch.classes = [row[torch.from_numpy(real)] for row, real in zip(watch.classes, rows, strict=False)]
        if logits.ndim == 2:  # one set of class logits for a row
            return [logits[b][None] for b in range(len(rows))], watch
        rows = rows[:, rows.shape[1] - logits.shape[1] :]
        columns = [np.flatnonzero(row)[0 if last is None else -last :] for row in rows]
        return [logits[b][torch.from_numpy(kept)] for b, kept in enumerate(columns)], watch

    def _near_slots(self, seen: Array, slots: IntArray, sliding_window: int) -> Array:
        """`[B, 1, Q, T]`: of the `seen` `[B, T]` columns those whose slot is less than the window back.

        `slots` `[B, Q]`: where the call's tokens go in a static cache.
        """
        held = np.concatenate((np.cumsum(self.real, axis=1) - 1, slots), axis=1)[:, None, None]
        row = slots[:, None, :, None]
        near: Array = seen[:, None, None] & (held <= row) & (held > row - sliding_window)
        return near

    def present(self, scores: Mapping[int, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """`present.{i}.key|value|score`, each `[Hkv, n_b, D]` per row: the row's real tokens in order, as far as the
        cache holds them.
        """
        result: dict[str, list[torch.Tensor]] = {}
        for index, layer in enumerate(cast("list[DynamicLayer]", self.cache.layers)):
            assert layer.keys is not None and layer.values is not None  # every call filled them
            held = layer.keys.shape[2]
            columns = [torch.from_numpy(np.flatnonzero(row[len(row) - held :])) for row in self.real]
            score = scores[index][..., scores[index].shape[-1] - held :].unsqueeze(-1)
            kinds = {"key": layer.keys, "value": layer.values, "score": score}
            for kind, tensor in kinds.items():
                result[f"present.{index}.{kind}"] = [tensor[b][:, c] for b, c in enumerate(columns)]
        return result
