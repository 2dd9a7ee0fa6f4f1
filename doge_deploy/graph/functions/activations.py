"""Activations inside a function body, by transformers' name (`ACT2FN`), in ONNX text form: `x` -> `y`."""

from __future__ import annotations

from doge_deploy.errors import UnsupportedModelError

_SIGMOID_LINEAR = "{y}_s = Sigmoid ({x})\n{y} = Mul ({x}, {y}_s)"
_TANH_GELU = '{y} = Gelu <approximate = "tanh"> ({x})'

_BODIES = {
    "silu": _SIGMOID_LINEAR,
    "swish": _SIGMOID_LINEAR,
    "gelu": "{y} = Gelu ({x})",
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "relu": "{y} = Relu ({x})",
    "relu2": "{y}_r = Relu ({x})\n{y} = Mul ({y}_r, {y}_r)",
    "sigmoid": "{y} = Sigmoid ({x})",
    "tanh": "{y} = Tanh ({x})",
    "mish": "{y} = Mish ({x})",
    "linear": "{y} = Identity ({x})",
}


def activation_body(name: str, source: str, target: str) -> str:
    """Nodes that compute `target = name(source)`; temporary names start with `target`.

    Raises:
        UnsupportedModelError: no standard-operator body is written for this activation.
    """
    if name not in _BODIES:
        legal = ", ".join(sorted(_BODIES))
        raise UnsupportedModelError(f"hidden_act={name!r} cannot be exported inside CDMoE; supported there: {legal}")
    return _BODIES[name].format(x=source, y=target) + "\n"
