"""The trace: its shortcut against the long way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from doge_deploy.bundle.signature import make_signature
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.graph.trace import trace


def nodes(model: ir.Model) -> list[Any]:
    return [
        (
            node.op_type,
            node.name,
            [value.name if value else None for value in node.inputs],
            [value.name for value in node.outputs],
            {name: str(attribute.value) for name, attribute in node.attributes.items()},
        )
        for node in model.graph
    ]


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("static", "float32"),
        pytest.param("static", "float16", marks=pytest.mark.sweep),
        pytest.param("growing", "float32", marks=pytest.mark.sweep),
        ("growing", "float16"),
    ],
)
def test_without_decompositions_the_graph_is_the_same(moe_doge: Path, layout: str, dtype: str) -> None:
    facts = open_checkpoint(str(moe_doge)).facts
    signature = make_signature(facts, layout, dtype=dtype, max_length=32, last_logits=True)

    def run(decompose: bool) -> ir.Model:
        start = time.perf_counter()
        model = trace(
            facts,
            signature,
            dtype=dtype,
            max_length=32,
            routing="reference",
            last_logits=True,
            decompose=decompose,
        )
        print(f"{layout} {dtype}, decompose={decompose}: {time.perf_counter() - start:.2f} s")
        return model

    short, long = run(decompose=False), run(decompose=True)
    assert len(nodes(short)) == len(nodes(long))
    assert [row[0] for row in nodes(short)] == [row[0] for row in nodes(long)]
    assert list(short.graph.initializers) == list(long.graph.initializers)


def test_an_activation_is_inlined_and_exports(tmp_path: Path) -> None:
    from bundles import make_bundle
    from random_doge import save_random_doge

    from doge_deploy.verify.run import verify

    checkpoint = save_random_doge(tmp_path / "checkpoint", hidden_act="quick_gelu", vocab_size=256)
    bundle = make_bundle(checkpoint, tmp_path / "bundle")
    assert verify(bundle, reference=str(checkpoint), greedy_steps=4).passed
