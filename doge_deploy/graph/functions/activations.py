"""Activations inside a function body, by transformers' name (`ACT2FN`), in ONNX text form.

Reference: transformers' activations.py; the numbers in the bodies are its own.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from doge_deploy.config.keys import TRAINED_ACTIVATIONS
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.functions.text import parse_function
from doge_deploy.graph.schemas import ACTIVATION

_SIGMOID_LINEAR = "s = Sigmoid (x)\ny = Mul (x, s)"
_TANH_GELU = 'y = Gelu <approximate = "tanh"> (x)'
_CLIPPED = "low = Constant <value_float = {low}> ()\nhigh = Constant <value_float = {high}> ()\n"

_BODIES = {
    "silu": _SIGMOID_LINEAR,
    "swish": _SIGMOID_LINEAR,
    "gelu": "y = Gelu (x)",
    "gelu_python": "y = Gelu (x)",
    # Four spellings of one formula; they differ in rounding alone.
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_python_tanh": _TANH_GELU,
    "gelu_accurate": _TANH_GELU,
    "relu": "y = Relu (x)",
    "relu2": "r = Relu (x)\ny = Mul (r, r)",
    "leaky_relu": "y = LeakyRelu <alpha = 0.01> (x)",
    "hardswish": "y = HardSwish (x)",
    "sigmoid": "y = Sigmoid (x)",
    "tanh": "y = Tanh (x)",
    "mish": "y = Mish (x)",
    "linear": "y = Identity (x)",
}
"""Activations that are one or two operators; they compute in the dtype of `x`."""

_FLOAT_BODIES = {
    "gelu_10": "g = Gelu (f)\n" + _CLIPPED.format(low=-10.0, high=10.0) + "h = Clip (g, low, high)",
    "relu6": _CLIPPED.format(low=0.0, high=6.0) + "h = Clip (f, low, high)",
    "quick_gelu": "c = Constant <value_float = 1.702> ()\nm = Mul (f, c)\ns = Sigmoid (m)\nh = Mul (f, s)",
    "sqrtsoftplus": "s = Softplus (f)\nh = Sqrt (s)",
    "gelu_fast": (
        "a = Constant <value_float = 0.044715> ()\n"
        "b = Constant <value_float = 0.7978845608> ()\n"
        "one = Constant <value_float = 1.0> ()\n"
        "half = Constant <value_float = 0.5> ()\n"
        "square = Mul (f, f)\n"
        "cubic = Mul (square, a)\n"
        "series = Add (cubic, one)\n"
        "line = Mul (f, b)\n"
        "inner = Mul (line, series)\n"
        "t = Tanh (inner)\n"
        "u = Add (t, one)\n"
        "v = Mul (f, half)\n"
        "h = Mul (u, v)"
    ),
    "laplace": (
        "mu = Constant <value_float = 0.707107> ()\n"
        f"sigma = Constant <value_float = {0.282095 * math.sqrt(2.0)!r}> ()\n"
        "one = Constant <value_float = 1.0> ()\n"
        "half = Constant <value_float = 0.5> ()\n"
        "moved = Sub (f, mu)\n"
        "scaled = Div (moved, sigma)\n"
        "e = Erf (scaled)\n"
        "u = Add (e, one)\n"
        "h = Mul (u, half)"
    ),
}
"""Activations with constants, `f` -> `h`: in float32, since a constant would lose digits in a smaller dtype."""

_TRAINED_BODIES = {
    "prelu": "y = PRelu (x, weight)",
    # Every result is rounded where transformers rounds it: what is made of the weights alone to bfloat16, in which it
    # keeps them, the rest to the dtype of `x`. exp(m) - 1 is tanh(m / 2) * (exp(m) + 1), which cancels nothing.
    "xielu": (
        "wide_p = Cast <to = 1> (alpha_p)\n"
        "soft_p = Softplus (wide_p)\n"
        "round_p = Cast <to = 16> (soft_p)\n"
        "p = CastLike (round_p, x)\n"
        "wide_n = Cast <to = 1> (alpha_n)\n"
        "soft_n = Softplus (wide_n)\n"
        "round_n = Cast <to = 16> (soft_n)\n"
        "again_n = Cast <to = 1> (round_n)\n"
        "wide_beta = Cast <to = 1> (beta)\n"
        "sum_n = Add (wide_beta, again_n)\n"
        "round_sum = Cast <to = 16> (sum_n)\n"
        "n = CastLike (round_sum, x)\n"
        "b = CastLike (beta, x)\n"
        "low = CastLike (eps, x)\n"
        "line = Mul (x, b)\n"
        "scaled = Mul (x, p)\n"
        "square = Mul (scaled, x)\n"
        "above = Add (square, line)\n"
        "least = Min (x, low)\n"
        "m = Cast <to = 1> (least)\n"
        "half = Constant <value_float = 0.5> ()\n"
        "one = Constant <value_float = 1.0> ()\n"
        "half_m = Mul (m, half)\n"
        "t = Tanh (half_m)\n"
        "e = Exp (m)\n"
        "e_one = Add (e, one)\n"
        "grown = Mul (t, e_one)\n"
        "grown_x = CastLike (grown, x)\n"
        "less = Sub (grown_x, x)\n"
        "curve = Mul (less, n)\n"
        "below = Add (curve, line)\n"
        "none = Constant <value_float = 0.0> ()\n"
        "zero = CastLike (none, x)\n"
        "positive = Greater (x, zero)\n"
        "y = Where (positive, above, below)"
    ),
}
"""Activations with weights of their own, named here as transformers names them."""

SUPPORTED = frozenset(_BODIES) | frozenset(_FLOAT_BODIES) | frozenset(_TRAINED_BODIES)


def weight_inputs(name: str) -> tuple[str, ...]:
    """Inputs that a function takes for the weights of its activation, in the order of `TRAINED_ACTIVATIONS`."""
    return tuple(f"act_fn_{index}" for index, _ in enumerate(TRAINED_ACTIVATIONS.get(name, ())))


def activation_body(name: str, source: str, target: str) -> str:
    """Nodes that compute `target = name(source)`; temporary names start with `target`, weights are `weight_inputs`.

    Raises:
        UnsupportedModelError: no standard-operator body is written for this activation.
    """
    if name not in SUPPORTED:
        legal = ", ".join(sorted(SUPPORTED))
        raise UnsupportedModelError(f"hidden_act={name!r} cannot be exported; must be one of {legal}")
    if name in _FLOAT_BODIES:
        body = f"f = Cast <to = 1> (x)\n{_FLOAT_BODIES[name]}\ny = CastLike (h, x)"
    else:
        body = _BODIES.get(name) or _TRAINED_BODIES[name]
    weights = zip(TRAINED_ACTIVATIONS.get(name, ()), weight_inputs(name), strict=True)
    names = {"x": source, "y": target, **dict(weights)}
    return "".join(f"    {_renamed(line, names, target)}\n" for line in body.split("\n"))


def activation_function(name: str) -> ir.Function:
    """`doge::Activation`, which a trace inlines.

    Raises:
        UnsupportedModelError: no standard-operator body is written for this activation.
    """
    return parse_function(ACTIVATION, ["x", *weight_inputs(name)], ["y"], [], activation_body(name, "x", "y"))


def _renamed(line: str, names: dict[str, str], prefix: str) -> str:
    """One node with its values renamed: `x` and `y` as told, temporaries with a prefix."""
    output, call = line.split(" = ", 1)
    head, arguments = call.rsplit("(", 1)
    inputs = [name.strip() for name in arguments.rstrip(")").split(",") if name.strip()]
    rename = {name: names.get(name, f"{prefix}_{name}") for name in [output, *inputs]}
    return f"{rename[output]} = {head}({', '.join(rename[name] for name in inputs)})"
