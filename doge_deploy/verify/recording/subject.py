"""Which bundles a recording may judge: those for which the reference would have been run in the very same way.

That is decided by the checkpoint's weights and config, by what is computed (task, dtype, layers, lengths, routing,
which logits), and by how weights are stored, since the reference of a quantized bundle has the same dequantized
weights. It is not decided by how it is computed: one recording judges the standard graph, the one that was lowered for
ONNX Runtime, every engine that is built from it, with local functions or without, exported by this version or another.
So a recording of an fp32 bundle judges neither an int8 nor an fp16 one, which have noise and weights of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from doge_deploy.bundle.files import CALIBRATION_TOKENS
from doge_deploy.bundle.manifest import Manifest

_OPTIONS = ("task", "dtype", "max_length", "routing", "logits", "num_layers", "quantize", "block_size", "symmetric")
"""Options of an export that decide what the reference is asked."""


def subject_of(manifest: Manifest) -> dict[str, Any]:
    """What a recording of this bundle is a recording of: plain values by name, the most telling first."""
    adapter = manifest.checkpoint.get("adapter")
    options = manifest.options.to_json()
    chosen = {name: options[name] for name in _OPTIONS if name != "routing" or manifest.facts.is_moe}
    found: dict[str, Any] = {
        "checkpoint": manifest.checkpoint["sha256"],
        "adapter": None if adapter is None else adapter["sha256"],
        **chosen,
        **manifest.facts.to_json(),
    }
    if CALIBRATION_TOKENS in manifest.files:
        found["calibration"] = manifest.files[CALIBRATION_TOKENS]["sha256"]
    result: dict[str, Any] = json.loads(json.dumps(found))
    return result


def first_difference(recorded: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The first fact that a recording and a bundle do not share, in words that fit after both; None: they share all."""
    for name in [*own, *(name for name in recorded if name not in own)]:
        ours, theirs = own.get(name), recorded.get(name)
        if name not in own or name not in recorded or ours != theirs or type(ours) is not type(theirs):
            return f"{name} is {_short(theirs)} in the recording and {_short(ours)} in the bundle"
    return None


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}..."
    text = "not set" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
