"""The RoPE part of a config.json, in transformers' 5.x form whatever form it was written in.

Reference: `RotaryEmbeddingConfigMixin` and the `_compute_*_parameters` functions in transformers'
modeling_rope_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from doge_deploy.config.keys import is_integer, is_number
from doge_deploy.diagnostics import suggest

_SPELLINGS = ("rope_parameters", "rope_scaling")

DEFAULT_THETA = 10000.0

STATEFUL_TYPES = ("dynamic", "longrope")
"""Types whose angles change with the longest position seen so far."""

Check = tuple[Callable[[Any], bool], str]


def _optional(check: Check) -> Check:
    test, legal = check
    return (lambda value: value is None or test(value)), f"{legal} or null"


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(is_number(item) and item > 0 for item in value)


_FACTOR: Check = (lambda value: is_number(value) and value >= 1, "a number >= 1")
_POSITIVE: Check = (lambda value: is_number(value) and value > 0, "a number > 0")
_NON_NEGATIVE: Check = (lambda value: is_number(value) and value >= 0, "a number >= 0")
_LENGTH: Check = (lambda value: is_integer(value) and value >= 2, "a whole number >= 2")
_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_LIST: Check = (_numbers, "a list of numbers > 0")

_REQUIRED: dict[str, dict[str, Check]] = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "dynamic": {"factor": _FACTOR},
    # transformers takes max_position_embeddings / original_max_position_embeddings for a factor of null
    "yarn": {"factor": _optional(_FACTOR), "original_max_position_embeddings": _LENGTH},
    "longrope": {"short_factor": _LIST, "long_factor": _LIST, "original_max_position_embeddings": _LENGTH},
    "llama3": {
        "factor": _FACTOR,
        "low_freq_factor": _POSITIVE,
        "high_freq_factor": _POSITIVE,
        "original_max_position_embeddings": _LENGTH,
    },
}
_OPTIONAL: dict[str, dict[str, Check]] = {
    "default": {},
    "linear": {},
    "dynamic": {},
    "yarn": {
        "attention_factor": _optional(_NON_NEGATIVE),
        "beta_fast": _optional(_POSITIVE),
        "beta_slow": _optional(_POSITIVE),
        "mscale": _optional(_NON_NEGATIVE),
        "mscale_all_dim": _optional(_NON_NEGATIVE),
        "truncate": _FLAG,
    },
    "longrope": {"factor": _optional(_FACTOR), "attention_factor": _optional(_NON_NEGATIVE)},
    "llama3": {},
}
ROPE_TYPES = tuple(_REQUIRED)

_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ROPE_KEYS = _COMMON_KEYS.union(*_REQUIRED.values(), *_OPTIONAL.values())


def read_rope(
    config: Mapping[str, Any], head_dim: int, max_position_embeddings: int
) -> tuple[dict[str, Any], list[str]]:
    """RoPE parameters as transformers 5.x holds them, less the keys that their type does not read.

    Args:
        config: a whole config.json. 5.x writes `rope_parameters`; 4.x wrote `rope_scaling` and `rope_theta`.
        head_dim: size of a head, which is how long the factor lists of longrope are, twice.
        max_position_embeddings: also the original length of the types that need one, where none is given.

    Returns:
        `{"rope_type": ..., "rope_theta": ..., ...}` and one finding per problem; good if there is none.
    """
    shaped = _shape_findings(config)
    if shaped:
        return {}, shaped
    rope, findings = _merge(config)
    rope_type = rope["rope_type"]
    if rope_type not in ROPE_TYPES:
        legal = ", ".join(ROPE_TYPES) + suggest(str(rope_type), ROPE_TYPES)
        return rope, [*findings, f"rope_type={rope_type!r}: must be one of {legal}"]
    if "original_max_position_embeddings" in _REQUIRED[rope_type]:
        rope.setdefault("original_max_position_embeddings", max_position_embeddings)
    findings += _value_findings(rope)
    if not findings:
        findings = _relation_findings(rope, head_dim)
    used = {"rope_type", "rope_theta", *_REQUIRED[rope_type], *_OPTIONAL[rope_type]}
    return {key: value for key, value in rope.items() if key in used}, findings


def _shape_findings(config: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={config[key]!r}: must be an object or null"
        for key in _SPELLINGS
        if config.get(key) is not None and not isinstance(config[key], Mapping)
    ]


def _merge(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """One dict of the two spellings; a finding where they contradict each other."""
    theta = config.get("rope_theta")
    spelled = {key: _complete(config[key], theta) for key in _SPELLINGS if config.get(key)}
    findings = []
    if len(spelled) == 2 and spelled["rope_parameters"] != spelled["rope_scaling"]:
        pair = " and ".join(f"{key}={config[key]!r}" for key in spelled)
        findings.append(f"{pair} contradict each other; keep rope_parameters")
    for key in spelled:
        given = config[key]
        inner = given.get("rope_theta")
        if theta is not None and inner is not None and inner != theta:
            findings.append(f"rope_theta={theta!r} contradicts {key}.rope_theta={inner!r}")
        names = {given[name] for name in ("rope_type", "type") if isinstance(given.get(name), str)}
        if len(names) == 2:
            findings.append(f"{key}: rope_type={given['rope_type']!r} contradicts type={given['type']!r}")
    rope = spelled.get("rope_parameters") or spelled.get("rope_scaling") or _complete({}, theta)
    return rope, findings


def _complete(given: Mapping[str, Any], theta: Any) -> dict[str, Any]:
    """A copy of `given` that always has `rope_type` and `rope_theta`."""
    rope = {key: value for key, value in given.items() if key != "type"}
    rope["rope_type"] = given.get("rope_type", given.get("type", "default"))
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = DEFAULT_THETA if theta is None else theta
    return rope


def _value_findings(rope: Mapping[str, Any]) -> list[str]:
    """Missing, unknown and ill-typed keys of one RoPE type."""
    rope_type = rope["rope_type"]
    required, optional = _REQUIRED[rope_type], _OPTIONAL[rope_type]
    unknown = [key for key in rope if key not in _ROPE_KEYS]
    findings = [f"unknown RoPE key {key!r}{suggest(key, _ROPE_KEYS)}" for key in unknown]
    findings += [f"rope_type={rope_type!r} needs {key!r}: missing" for key in required if key not in rope]
    for key, (test, legal) in {**required, **optional}.items():
        if key in rope and not test(rope[key]):
            findings.append(f"{key}={rope[key]!r} of rope_type={rope_type!r}: must be {legal}")
    theta = rope["rope_theta"]
    if not (is_number(theta) and theta > 1):
        findings.append(f"rope_theta={theta!r}: must be a finite number > 1")
    partial = rope.get("partial_rotary_factor")
    if partial not in (None, 1):
        findings.append(f"partial_rotary_factor={partial!r}: a partly rotated head is not supported")
    return findings


def _relation_findings(rope: Mapping[str, Any], head_dim: int) -> list[str]:
    """Values that are legal alone and not together."""
    findings = []
    if rope["rope_type"] == "dynamic" and head_dim == 2:
        findings.append("head_dim=2 with rope_type='dynamic', whose exponent is D/(D-2): must be >= 4")
    if rope["rope_type"] == "longrope":
        for key in ("short_factor", "long_factor"):
            if len(rope[key]) != head_dim // 2:
                findings.append(f"{key} has {len(rope[key])} numbers: must be head_dim/2 = {head_dim // 2}")
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if low >= high:
            findings.append(f"low_freq_factor={low!r}: must be less than high_freq_factor={high!r}")
    if rope["rope_type"] == "yarn":
        fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
        if fast < slow:
            findings.append(f"beta_fast={fast!r}: must be at least beta_slow={slow!r}")
    return findings
