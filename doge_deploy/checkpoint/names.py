"""The tensors that a Doge must have, and what is wrong with those that it has.

Reference: modeling_doge.py of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from doge_deploy.checkpoint.headers import TensorInfo
from doge_deploy.config.keys import TRAINED_ACTIVATIONS
from doge_deploy.config.model import ARCHITECTURE, DogeFacts
from doge_deploy.diagnostics import MAX_FINDINGS
from doge_deploy.dtypes import FLOATS
from doge_deploy.errors import UnsupportedModelError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"

Shapes = dict[str, tuple[int, ...]]


PREFIX = "model."
"""Before the names of the decoder's tensors, except in a `DogeModel` that was saved without a head."""


def with_prefix(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint of the decoder alone under the names that they have in one with a head."""
    return {PREFIX + name: info for name, info in tensors.items()}


def task_tensors(facts: DogeFacts, task: str) -> Shapes:
    """The tensors that a bundle for `task` has: all but the head for features."""
    shapes = expected_tensors(facts)
    return {name: shape for name, shape in shapes.items() if task != "features" or name.startswith(PREFIX)}


def expected_tensors(facts: DogeFacts) -> Shapes:
    """Name and shape of every tensor; of a tied head there is none."""
    shapes: Shapes = {EMBEDDING: (facts.vocab_size, facts.hidden_size)}
    for layer in range(facts.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in layer_tensors(facts).items()}
    shapes["model.norm.weight"] = (facts.hidden_size,)
    if facts.num_labels is not None:
        shapes[SCORE] = (facts.num_labels, facts.hidden_size)
    elif facts.architecture == ARCHITECTURE and not facts.tie_word_embeddings:
        shapes[HEAD] = (facts.vocab_size, facts.hidden_size)
    return shapes


def layer_tensors(facts: DogeFacts) -> Shapes:
    """Name and shape of every tensor of one layer."""
    hidden, inner, head_dim, kv_heads = (
        facts.hidden_size,
        facts.intermediate_size,
        facts.head_dim,
        facts.num_key_value_heads,
    )
    width, kv_width = facts.num_attention_heads * head_dim, kv_heads * head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "input_residual": (hidden,),
        **_linear("self_attn.q_proj", width, hidden, bias=facts.attention_bias),
        **_linear("self_attn.k_proj", kv_width, hidden, bias=facts.attention_bias),
        **_linear("self_attn.v_proj", kv_width, hidden, bias=facts.attention_bias),
        "self_attn.A": (facts.num_score_heads,),
        **_linear("self_attn.dt_proj", facts.num_score_heads, kv_width, bias=facts.attention_bias),
        **_linear("self_attn.o_proj", hidden, width, bias=facts.attention_bias),
        **({f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"} if facts.qk_norm else {}),
        "post_attention_layernorm.weight": (hidden,),
        "post_attention_residual": (hidden,),
        **_linear("mlp.gate_proj", inner, hidden, bias=facts.mlp_bias),
        **_linear("mlp.up_proj", inner, hidden, bias=facts.mlp_bias),
        **_linear("mlp.down_proj", hidden, inner, bias=facts.mlp_bias),
        **{f"mlp.act_fn.{name}": shape for name, shape in TRAINED_ACTIVATIONS.get(facts.hidden_act, {}).items()},
    }
    if facts.is_moe:
        shapes |= _linear("mlp.router_gate", 2 * facts.num_keys, hidden, bias=False)
        shapes["mlp.down_embed.weight"] = (facts.num_experts, hidden)
        shapes["mlp.up_embed.weight"] = (facts.num_experts, hidden)
    return shapes


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def check_tensors(
    tensors: Mapping[str, TensorInfo], facts: DogeFacts, source: str, *, spell: Callable[[str], str] = str
) -> None:
    """Compare stored tensors with those that the facts call for.

    Args:
        tensors: what is stored. A tied checkpoint may store its head too.
        facts: what config.json says.
        source: what to call the checkpoint in a message.
        spell: gives the name that the checkpoint's own revision has for a tensor, for a message.

    Raises:
        UnsupportedModelError: tensors are missing, unexpected, wrong-shaped or ill-typed; names them all.
    """
    # a config may announce a billion layers; every layer has tensors, so this is known without listing them
    layers, stored = facts.num_hidden_layers, len(tensors)
    if layers > stored:
        raise UnsupportedModelError(f"{source}: num_hidden_layers={layers}, but only {stored} tensors are stored")
    expected = expected_tensors(facts)
    optional = {HEAD: expected[EMBEDDING]} if facts.tie_word_embeddings else {}
    allowed = {**expected, **optional}
    groups = [
        ""
        if any(name.endswith(".self_attn.A") for name in tensors)
        else "not a Doge's weights: no self_attn.A in any layer",
        _group("missing", [spell(name) for name in expected if name not in tensors]),
        _group("unexpected", [spell(name) for name in tensors if name not in allowed]),
        _group(
            "wrong shape",
            [
                f"{spell(name)} is {list(tensors[name].shape)}, must be {list(shape)}"
                for name, shape in allowed.items()
                if name in tensors and tensors[name].shape != shape
            ],
        ),
        _group(
            f"dtype not one of {', '.join(FLOATS)}",
            [f"{spell(name)} is {info.dtype}" for name, info in tensors.items() if info.dtype not in FLOATS],
        ),
    ]
    found = [group for group in groups if group]
    if found:
        raise UnsupportedModelError(f"{source}: tensors do not fit config.json: {'; '.join(found)}")


def _group(title: str, names: list[str]) -> str:
    """`3 missing: a; b; c`, or nothing."""
    if not names:
        return ""
    shown = names[:MAX_FINDINGS]
    rest = f"; and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{len(names)} {title}: {'; '.join(shown)}{rest}"
