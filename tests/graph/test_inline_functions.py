"""`export --inline-functions`: standard graphs without local functions compute and show the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from bundles import broken_copy, own_bundle, shared_bundle

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.doctor.model import open_model
from doge_deploy.errors import BrokenBundleError, UnsupportedModelError
from doge_deploy.graph.passes.expose_selections import ExposeSelectionsPass
from doge_deploy.graph.passes.inline_functions import InlineFunctionsPass
from doge_deploy.graph.schemas import CDMOE, DYNAMIC_MASK_ATTENTION
from doge_deploy.options.build import BuildOptions
from doge_deploy.runtime.generate import generate
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.sampling import Sampler, SamplingOptions
from doge_deploy.targets.backend import find
from doge_deploy.targets.trt.choices import check_model
from doge_deploy.targets.trt.layout import lower_layout
from doge_deploy.verify.run import verify

BOTH = ("static", "growing")
PROMPT = [5, 9, 33, 12, 40]


@pytest.fixture(params=["dense_doge", "moe_doge"])
def doge(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def inlined(doge: Path) -> Path:
    return shared_bundle(doge, kv_cache=BOTH, inline_functions=True)


@pytest.fixture
def plain(doge: Path) -> Path:
    return shared_bundle(doge, kv_cache=BOTH)


def graphs(bundle: Path) -> dict[str, onnx.ModelProto]:
    return {
        name: onnx.load(bundle / layout.file, load_external_data=False)
        for name, layout in open_bundle(bundle).manifest.layouts.items()
    }


def greedy(bundle: Path, layout: str, *, portable: bool) -> list[int]:
    runner = open_runner(open_bundle(bundle), layout, threads=1, portable=portable)
    sampler = Sampler(SamplingOptions(do_sample=False))
    return list(generate(runner, PROMPT, sampler, max_new_tokens=48, eos_ids=()))


def test_no_function_and_only_standard_operators(inlined: Path, plain: Path) -> None:
    for name, model in graphs(inlined).items():
        assert len(model.functions) == 0
        assert [domain.domain for domain in model.opset_import] == [""]
        assert {node.domain for node in model.graph.node} <= {""}
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)
        other = graphs(plain)[name]
        assert len(other.functions) > 0, "the choice makes no difference"
        assert (model.graph.input, model.graph.output) == (other.graph.input, other.graph.output)


def test_nothing_else_of_the_bundle_changes(inlined: Path, plain: Path) -> None:
    ours, theirs = (open_bundle(path).manifest for path in (inlined, plain))
    differing = [name for name in theirs.files if ours.files[name] != theirs.files[name]]
    assert sorted(ours.files) == sorted(theirs.files)
    assert differing == ["model.growing.onnx", "model.onnx"], "the graph lowered for ONNX Runtime is of the functions"
    assert "model.ort.onnx" in theirs.files
    assert ours.options == replace(theirs.options, inline_functions=True)


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("model", [pytest.param("doge-tiny", marks=pytest.mark.sweep), "doge-tiny-moe"])
def test_the_same_tokens(model: str, layout: str) -> None:
    """Of trained models: random weights repeat one token."""
    plain, inlined = (shared_bundle(model, kv_cache=BOTH, inline_functions=inline) for inline in (False, True))
    wanted = greedy(plain, layout, portable=True)
    assert len(wanted) == 48 and len(set(wanted)) > 10
    assert greedy(inlined, layout, portable=True) == wanted
    if layout == "static":
        assert greedy(inlined, layout, portable=False) == greedy(plain, layout, portable=False)


@pytest.mark.parametrize("layout", BOTH)
def test_the_same_selections_are_exposed(layout: str, inlined: Path, plain: Path) -> None:
    moe = open_bundle(plain).manifest.facts.is_moe
    operators = [DYNAMIC_MASK_ATTENTION, CDMOE] if moe else [DYNAMIC_MASK_ATTENTION]
    outputs = []
    for bundle in (plain, inlined):
        model = ir.load(bundle / open_bundle(bundle).layout(layout).file)
        own = len(model.graph.outputs)
        shown = ExposeSelectionsPass(operators)(model).model.graph.outputs[own:]
        outputs.append([(value.name, value.dtype) for value in shown])
    names = ["kept.0", "experts.0", "kept.1", "experts.1"] if moe else ["kept.0", "kept.1"]
    assert [name for name, _ in outputs[0]] == names
    assert outputs[1] == outputs[0]


@pytest.mark.parametrize("name", ["kept", "experts"])
def test_a_selection_that_is_not_there_is_an_error(name: str, moe_doge: Path) -> None:
    model = ir.load(shared_bundle(moe_doge, kv_cache=BOTH, inline_functions=True) / "model.onnx")
    for node in model.graph:
        for value in node.outputs:
            if str(value.name).startswith(f"{name}."):
                value.name = f"renamed_{value.name}"
    with pytest.raises(BrokenBundleError, match=rf"neither local functions nor a value named {name}\.0"):
        ExposeSelectionsPass([DYNAMIC_MASK_ATTENTION, CDMOE])(model)


def test_verify_passes_and_judges_selections(inlined: Path, doge: Path) -> None:
    report = verify(inlined, reference=str(doge), greedy_steps=8, portable=True)
    assert report.failed_cases == []
    assert report.graphs == {"static": "model.onnx", "growing": "model.growing.onnx"}
    judged = {(result.layout, result.case) for result in report.results if result.selected}
    assert {(layout, "window K=2w") for layout in BOTH} <= judged


def test_verify_finds_a_wrong_selection(dense_doge: Path, tmp_path: Path) -> None:
    """One layer of the inlined graph selects the worst keys, not the best."""

    def worst(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == "TopK")
        node.attributes["largest"] = ir.AttrInt64("largest", 0)

    bundle = shared_bundle(dense_doge, kv_cache=BOTH, inline_functions=True)
    broken = broken_copy(bundle, tmp_path / "broken", graph=worst, portable=True)
    report = verify(broken, reference=str(dense_doge), layouts=("static",), greedy_steps=4, portable=True)
    assert "static/window K=2w" in report.failed_cases


def test_the_lowering_for_tensorrt_is_judged_with_selections(dense_doge: Path) -> None:
    bundle = shared_bundle(dense_doge, kv_cache=BOTH, inline_functions=True)
    report = verify(bundle, reference=str(dense_doge), greedy_steps=4, lowering=True)
    assert report.failed_cases == []
    assert any(result.selected for result in report.results)


def test_a_task_without_a_cache(tmp_path: Path, dense_doge: Path) -> None:
    bundle = shared_bundle(dense_doge, task="features", inline_functions=True)
    assert [len(model.functions) for model in graphs(bundle).values()] == [0]
    assert open_bundle(bundle).manifest.options.inline_functions
    report = verify(bundle, reference=str(dense_doge))
    assert report.failed_cases == []


def test_plugins_need_the_functions(tiny_inlined: Path) -> None:
    bundle = open_bundle(tiny_inlined)
    with pytest.raises(UnsupportedModelError, match=r"no local functions.*; build with --no-plugins, or export"):
        check_model(bundle, BuildOptions(target="trt"))
    for options in (BuildOptions(target="trt", plugins=False), BuildOptions(target="trt-rtx")):
        check_model(bundle, options)
    said = [
        obstacle.reason for obstacle in find("trt").model_obstacles(open_model(str(tiny_inlined)), "fp32", "plugins")
    ]
    assert any("no local functions" in reason for reason in said), "doctor says what build says"


def test_an_engine_of_native_layers_is_built_of_the_same_graph(dense_doge: Path) -> None:
    """Up to names: the lowering for TensorRT replaces the functions itself."""
    found = []
    for inline in (True, False):
        bundle = open_bundle(shared_bundle(dense_doge, kv_cache=BOTH, inline_functions=inline))
        lowered = lower_layout(bundle, bundle.layout("static"), use_plugins=False).model
        found.append([(node.op_type, node.name) for node in lowered.graph])
    assert found[0] == found[1]


@pytest.fixture
def tiny_inlined() -> Path:
    return shared_bundle("doge-tiny", inline_functions=True)


def test_bundles_of_before_have_functions(tmp_path: Path) -> None:
    bundle = own_bundle(tmp_path / "old", "doge-tiny", kv_cache=BOTH)
    file = bundle / "manifest.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["options"].pop("inline_functions") is False
    file.write_text(json.dumps(document), encoding="utf-8")
    assert open_bundle(bundle).manifest.options.inline_functions is False


def test_the_option_of_the_command(dense_doge: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    command = ["export", str(dense_doge), "-o", str(target), "--kv-cache", "growing", "--inline-functions"]
    assert run_command(command) == 0
    assert open_bundle(target).manifest.options.inline_functions
    assert [len(model.functions) for model in graphs(target).values()] == [0]


def test_a_graph_without_functions_stays_as_it_is(dense_doge: Path) -> None:
    file = shared_bundle(dense_doge, kv_cache=BOTH, inline_functions=True) / "model.onnx"
    result = InlineFunctionsPass()(ir.load(file))
    assert not result.modified
    assert ir.to_proto(result.model) == ir.to_proto(ir.load(file))
