"""Reports made up for tests of what is done with them; nothing is run."""

from __future__ import annotations

from pathlib import Path

from doge_deploy.verify.compare import Difference, Top1
from doge_deploy.verify.environment import Environment
from doge_deploy.verify.oracle import SelfDifference, WeightsResult
from doge_deploy.verify.parity import CaseResult, Quantity
from doge_deploy.verify.positions import Positions, Sample
from doge_deploy.verify.report import Report
from doge_deploy.verify.tolerance import AllowedDifference


def quantity(name: str, load: float) -> Quantity:
    """A tensor that uses `load` of its tolerance."""
    found = Difference(load * 1e-5, load * 1e-6, load * 1e-6, 1 - 1e-13, (0, 3), 10.0, 500.0, 0)
    return Quantity(name, found, AllowedDifference(1e-5, 1e-5))


def case(name: str, layout: str = "static", *, logits: float = 0.3, key: float = 0.2, layers: int = 2) -> CaseResult:
    """A case of dense layers whose tensors use so much of their tolerance."""
    result = CaseResult(name, layout)
    result.quantities = [quantity("logits", logits)]
    result.quantities += [
        quantity(f"present.{layer}.{what}", key) for layer in range(layers) for what in ("key", "value")
    ]
    result.failures = [f"{one.name}: too far" for one in result.quantities if not one.passed]
    result.kl, result.top1 = 1e-12, Top1(3, 4, 2, 1e-4)
    result.positions = Positions(
        (0, 0, 1, 2), (0, 0, 0, 0), (0, 1, 2, 3), (5, 6, 7, 8), (6, 7, 8, 9), (6, 7, 3, 9), (1e-6, 2e-6, 9e-6, 3e-6)
    )
    result.sample = Sample((1.0, -2.0), (1.000001, -2.0), (0,) * 19 + (5,) + (0,) * 20, 3, 8)
    return result


def report(*cases: CaseResult, dtype: str = "float32", routing: str | None = None) -> Report:
    """Of these cases."""
    return Report(
        Path("bundle"),
        dtype,
        routing,
        "transformers",
        WeightsResult(49, ()),
        list(cases),
        {"window K=2w": "needs 128 tokens, max_length is 64"},
        SelfDifference(1e-5, 19.0),
        {layout: f"{layout}.onnx" for layout in dict.fromkeys(one.layout for one in cases)},
        environment=Environment("0.1", "3.11", "Linux x86_64", "a processor", 2, {"onnxruntime": "1.32"}),
        checkpoint="doge-tiny, sha256 00",
        command="doge-deploy verify bundle",
    )
