"""docs/config-keys.md, made from the tests that show what becomes of each key.

python tests/config_keys_page.py          # writes the page
"""

# ruff: noqa: E402, E501 (the path comes first; a table reads best with one row a line)

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in (".", "config", "verify", "model")]

import test_config
import test_decoder
import test_parity
import test_tasks

from doge_deploy.config import keys as config_keys

PAGE = Path(__file__).parent.parent / "docs" / "config-keys.md"

PLACES = {
    "verify": (test_parity.CASES, "tests/verify/test_parity.py"),
    "tasks": (test_tasks.CASES, "tests/verify/test_tasks.py"),
    "model": (test_decoder.CONFIGS, "tests/model/test_decoder.py"),
    "refused": (test_config.REFUSED, "tests/config/test_config.py"),
    "ignored": (test_config.IGNORED, "tests/config/test_config.py"),
    "accepted": (test_config.ACCEPTED, "tests/config/test_config.py"),
    "rope": (test_config.ROPES, "tests/config/test_config.py"),
}
"""Where a case is, by the word that stands before its id below."""

EXACT: dict[str, tuple[str, str]] = {
    "model_type": ("must be `doge`", "refused:llama"),
    "architectures": (
        "causal language model, sequence classification or bare model",
        "tasks:classes refused:token-classification",
    ),
    "vocab_size": ("any", "verify:dense-fp32-all"),
    "hidden_size": ("any; need not be heads times `head_dim`", "model:wide-head"),
    "intermediate_size": ("any", "verify:dense-fp32-all"),
    "num_hidden_layers": ("any", "verify:dense-fp32-all refused:zero-layers"),
    "num_attention_heads": ("any", "model:one-head"),
    "num_key_value_heads": ("any divisor of the heads", "verify:one-kv-head-per-head refused:heads-not-divisible"),
    "head_dim": (
        "even; rotation works on two halves, and transformers fails on an odd one",
        "model:wide-head refused:odd-head",
    ),
    "hidden_act": (
        "all of transformers'; `xielu` in fp32 and bf16, since transformers fails in fp16",
        "model:gelu verify:prelu-moe-fp16 verify:xielu-moe verify:xielu-bf16 refused:activation",
    ),
    "rms_norm_eps": ("any", "verify:dense-fp32-all refused:nan-eps"),
    "tie_word_embeddings": ("both", "verify:untied-biases"),
    "max_position_embeddings": ("any; the default of `--max-length`", "verify:dynamic-beyond"),
    "rope_parameters": (
        "default, linear, dynamic, yarn, longrope, llama3; dynamic and longrope also beyond their length",
        "rope:yarn rope:llama3 verify:dynamic-beyond verify:longrope-beyond-bf16",
    ),
    "rope_scaling": ("the 4.x spelling", "rope:4.x-dynamic refused:rope-contradiction"),
    "rope_theta": ("the 4.x spelling", "rope:theta-only refused:rope-two-thetas"),
    "attention_bias": ("both", "verify:untied-biases"),
    "mlp_bias": ("both", "verify:untied-biases"),
    "sliding_window": (
        "2 or more; with 1 transformers' cache keeps every key",
        "verify:sliding verify:sliding-moe refused:sliding-window-of-one",
    ),
    "keep_window_size": ("1 or more, beyond the text too", "verify:window-1 verify:window-unreachable"),
    "is_moe": ("both", "verify:moe-reference"),
    "num_experts": (
        "any; those beyond the largest square are never reached, as in transformers",
        "verify:moe-reference",
    ),
    "num_experts_per_tok": (
        "up to the reachable experts; transformers fails beyond",
        "verify:moe-reference refused:too-many-experts",
    ),
    "norm_topk_prob": ("both", "model:moe-norm-topk"),
    "bos_token_id": ("any in the vocabulary", "verify:dense-fp32-all"),
    "eos_token_id": ("any, or a list", "refused:eos-list-outside"),
    "pad_token_id": (
        "any, or none; decides where a classification looks",
        "tasks:five-classes-without-padding-token-fp16 refused:pad-outside",
    ),
    "dtype": ("fp32, fp16, bf16", "verify:dense-fp16 verify:dense-bf16 refused:dtype"),
    "torch_dtype": ("the older name of `dtype`", "accepted:old-dtype-key"),
    "id2label": ("its size, for a classification", "refused:no-labels"),
    "num_labels": ("for a classification", "tasks:five-classes-without-padding-token-fp16"),
}
"""Keys that are used: what is exact, and the cases that show it."""


def page() -> str:
    """The page's text. Raises KeyError where a case that is named does not exist."""
    lines = [
        "# Every key of config.json",
        "",
        "Written by `python tests/config_keys_page.py`; a test fails when this page is stale or names a case that is gone.",
        "",
        "`exact`: part of the graph, and equal to transformers. `refused`: exit code 3, and the key is named. `ignored`: checked,",
        "and without effect on any number. A key that is not in this table is refused if it is one or two letters from one that is;",
        "any other is ignored, as transformers ignores it, with a warning that names it and that the manifest keeps.",
        "`export --strict` refuses them all. `nox -s properties` draws from all values that are exact.",
        "",
        "| Key | | What | Shown by |",
        "| --- | --- | --- | --- |",
    ]
    for key in sorted(EXACT):
        what, cases = EXACT[key]
        lines.append(f"| `{key}` | exact | {what} | {', '.join(map(_case, cases.split()))} |")
    for key, why in sorted(config_keys.REFUSED_KEYS.items()):
        lines.append(f"| `{key}` | refused | {why} | `tests/config/test_config.py` |")
    for key in sorted(config_keys.MUST_BE_OFF):
        lines.append(f"| `{key}` | refused if set | not a Doge setting | {_case('refused:encoder-decoder')} |")
    for key in sorted(config_keys.LEGACY_KEYS):
        lines.append(
            f"| `{key}` | ignored with a warning | of the original SmallDoge code; read in a [legacy](legacy.md) checkpoint alone | {_case('ignored:legacy-mask-ratio')} |"
        )
    for key in sorted(config_keys.INERT_DOGE_KEYS):
        lines.append(
            f"| `{key}` | ignored | training or bookkeeping; its type is checked | {_case('refused:dropout')} |"
        )
    ignored = sorted(config_keys.STANDARD_KEYS - config_keys.MUST_BE_OFF - EXACT.keys())
    lines += [
        "",
        "Ignored too, since they change none of a Doge's numbers: " + ", ".join(f"`{key}`" for key in ignored) + ".",
    ]
    return "\n".join(lines) + "\n"


def _case(name: str) -> str:
    place, case = name.split(":")
    cases, path = PLACES[place]
    cases[case]  # must exist
    return f"`{path}` {case}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
