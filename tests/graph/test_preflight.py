"""Plugin nodes against registered plugins: one line for everything that TensorRT would only call "not found"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from plugin_graphs import attention_graph, moe_graph

from doge_deploy.errors import BrokenBundleError, UnsupportedModelError, UsageError
from doge_deploy.graph.passes.plugin_chains import PluginChainPass
from doge_deploy.graph.preflight import check_file, check_plugins, require_plugins
from doge_deploy.kernels.registry import installed


def lowered(window: int = 16, **options: int | str) -> ir.Model:
    return PluginChainPass(installed())(attention_graph(window=window, **options)).model  # type: ignore[arg-type]


def test_a_lowered_graph_fits() -> None:
    verdicts = check_plugins(lowered(), installed())
    assert [verdict.problems for verdict in verdicts] == [(), (), ()]
    assert verdicts[0].undecided == ("K below 2^24",)


def rename(node: ir.Node) -> None:
    node.op_type = "DynamicMaskSelct"


def renamespace(node: ir.Node) -> None:
    node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", "dogs")


def unnamespace(node: ir.Node) -> None:
    del node.attributes["plugin_namespace"]


def reversion(node: ir.Node) -> None:
    node.attributes["plugin_version"] = ir.AttrString("plugin_version", "2")


def unknown_attribute(node: ir.Node) -> None:
    node.attributes["row"] = ir.AttrInt64("row", 2)


def no_attribute(node: ir.Node) -> None:
    del node.attributes["rows"]


def float_attribute(node: ir.Node) -> None:
    node.attributes["rows"] = ir.AttrFloat32("rows", 64.0)


def illegal_attribute(node: ir.Node) -> None:
    node.attributes["rows"] = ir.AttrInt64("rows", 7)


def limit(node: ir.Node) -> None:
    node.attributes["keep_window_size"] = ir.AttrInt64("keep_window_size", 0)


def wrong_dtype(node: ir.Node) -> None:
    node.inputs[0].dtype = ir.DataType.FLOAT16  # type: ignore[union-attr]


def unsupported_t(node: ir.Node) -> None:
    node.inputs[2].dtype = ir.DataType.DOUBLE  # type: ignore[union-attr]


def wrong_rank(node: ir.Node) -> None:
    node.inputs[0].shape = ir.Shape(["B", 2, "K"])  # type: ignore[union-attr]


def wrong_size(node: ir.Node) -> None:
    node.inputs[0].shape = ir.Shape(["B", 2, "K", 3])  # type: ignore[union-attr]


def too_many_slots(node: ir.Node) -> None:
    node.inputs[0].shape = ir.Shape(["B", 2, 2**24, 1])  # type: ignore[union-attr]


def fewer_inputs(node: ir.Node) -> None:
    node.resize_inputs(2)


BROKEN: list[tuple[Callable[[ir.Node], None], str]] = [
    (
        rename,
        r"no plugin doge::DynamicMaskSelct is registered \(did you mean 'doge::DynamicMaskSelect'\?\); registered:",
    ),
    (renamespace, "plugin DynamicMaskSelect is registered in namespace 'doge', the node says 'dogs'"),
    (unnamespace, "plugin DynamicMaskSelect is registered in namespace 'doge', the node says ''"),
    (reversion, "registered as version 1, the node asks for version 2"),
    (unknown_attribute, "unknown attribute 'row'; known: keep_window_size, rows"),
    (no_attribute, "attribute 'rows' is missing"),
    (float_attribute, "attribute rows=64.0 must be of type int"),
    (illegal_attribute, "attribute rows=7 must be one of 16, 32, 64"),
    (limit, "is outside its limits: keep_window_size at least 1"),
    (wrong_dtype, r"score is float16; takes score: float32\[B, S, K, 1\]"),
    (unsupported_t, "query is float64; takes query: T.*, T one of float32, float16, bfloat16"),
    (wrong_rank, r"score has 3 axes \[B, 2, K\]; takes score: float32\[B, S, K, 1\]"),
    (wrong_size, "score axis 3 is 3; 1 is needed"),
    (too_many_slots, r"K=16777216, .* is outside its limits: K below 2\^24"),
    (fewer_inputs, "2 inputs; takes 3: score: float32"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_what_does_not_fit_is_named_with_its_node(damage: Callable[[ir.Node], None], message: str) -> None:
    model = lowered()
    damage(model.graph[0])
    with pytest.raises(UnsupportedModelError, match=f"layer.DynamicMaskAttention/DynamicMaskSelect: .*{message}"):
        require_plugins(model, installed())


def test_tensors_of_one_dtype_must_have_one() -> None:
    model = lowered()
    model.graph.inputs[1].dtype = ir.DataType.FLOAT
    with pytest.raises(UnsupportedModelError, match="key is float32, but query is float16; both are of dtype T"):
        require_plugins(model, installed())


def test_a_compile_time_dimension_must_be_a_number() -> None:
    model = lowered(D="width")
    with pytest.raises(UnsupportedModelError, match="D is width; it must be a number when the engine is built"):
        require_plugins(model, installed())


def test_an_operator_that_was_not_lowered_is_no_plugin() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer\.CDMoE: no plugin ::CDMoE is registered"):
        require_plugins(moe_graph(), installed())


def test_operators_of_a_file_are_lowered_and_checked(tmp_path: Path) -> None:
    ir.save(moe_graph(), tmp_path / "moe.onnx")
    verdicts = check_file(tmp_path / "moe.onnx")
    assert [verdict.node.plugin for verdict in verdicts] == ["CDMoERoute", "CDMoEExperts"]


def test_a_plugin_graph_is_checked_as_it_is(tmp_path: Path) -> None:
    ir.save(lowered(), tmp_path / "plugins.onnx")
    assert len(check_file(tmp_path / "plugins.onnx")) == 3


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(BrokenBundleError, match=r"text.onnx is not an ONNX model"):
        check_file(tmp_path / "text.onnx")
    with pytest.raises(UsageError, match="no such file"):
        check_file(tmp_path / "absent.onnx")
