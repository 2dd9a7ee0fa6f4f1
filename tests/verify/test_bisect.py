"""Two bundles of one checkpoint: the pass, the weight or the option by which they differ is named."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import pytest
from bundles import edit_tensor, own_bundle, shared_bundle
from localize_faults import attention_with_weights_the_other_way, norms_with_another_epsilon, one_percent
from sweeps import cases

from doge_deploy.bundle.files import WEIGHTS_FILE, file_entries
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.cli.main import run_command
from doge_deploy.errors import MissingDependencyError, UnsupportedModelError
from doge_deploy.targets.ort import experts, head, linears, quantized
from doge_deploy.targets.ort.lower import lower
from doge_deploy.verify.bisect.run import bisect


@contextmanager
def packed_from_the_last() -> Iterator[None]:
    """PackLinearsPass lays the weights side by side from the last to the first."""
    right = linears._pack

    def wrong(group: Any) -> None:
        graph = group[0].product.graph
        before = set(graph)
        right(group)
        for node in graph:
            if node not in before and node.op_type == "Concat" and len(node.inputs) > 1:
                for index, value in enumerate(list(node.inputs)[::-1]):
                    node.replace_input_with(index, value)

    with patch.object(linears, "_pack", wrong):
        yield


@contextmanager
def emitting(module: Any, operator: str, **wrong: Any) -> Iterator[None]:
    """A pass gives one of its operators other attributes."""
    right = module.Emitter

    class Wrong(right):  # type: ignore[misc, valid-type]
        def __call__(self, op_type: str, *inputs: Any, **options: Any) -> Any:
            return super().__call__(op_type, *inputs, **{**options, **(wrong if op_type == operator else {})})

    with patch.object(module, "Emitter", Wrong):
        yield


@contextmanager
def experts_of_the_other_half() -> Iterator[None]:
    """RoutedExpertsPass hands the tables over in the wrong order."""
    right = experts._emit

    def wrong(mixture: Any, index: int, shared: Any) -> None:
        first, second = mixture.node.inputs[2], mixture.node.inputs[3]
        mixture.node.replace_input_with(2, second)
        mixture.node.replace_input_with(3, first)
        right(mixture, index, shared)

    with patch.object(experts, "_emit", wrong):
        yield


DENSE: dict[str, Any] = {"logits": "all"}
PASSES: dict[str, tuple[str, dict[str, Any], Callable[[], Any], str, str]] = {
    "attention": ("doge-tiny", DENSE, attention_with_weights_the_other_way, "FuseAttentionPass", "stage q_norm"),
    "norms": ("doge-tiny", DENSE, norms_with_another_epsilon, "FuseNormsPass", "stage post_norm"),
    "linears": ("doge-tiny", DENSE, packed_from_the_last, "PackLinearsPass", "layer 0, stage q"),
    "head": ("doge-tiny", DENSE, lambda: emitting(head, "FusedMatMul", alpha=1.01), "TiedHeadPass", "stage head"),
    "experts": ("doge-tiny-moe", DENSE, experts_of_the_other_half, "RoutedExpertsPass", "stage experts"),
    "quantized": (
        "doge-tiny",
        {"quantize": "int8"},
        lambda: patch.object(quantized, "ACCURACY_LEVEL", 1),
        "QuantizedWeightsPass",
        "layer 0, stage q",
    ),
}


@pytest.mark.parametrize(("model", "options", "fault", "name", "where"), cases(PASSES, ["attention", "linears"]))
def test_the_pass_is_named(
    model: str, options: dict[str, Any], fault: Callable[[], Any], name: str, where: str, tmp_path: Path
) -> None:
    good = shared_bundle(model, **options)
    bad = own_bundle(tmp_path / "bad", model, **options)
    opened = open_bundle(bad)
    with fault():
        ir.save(lower(ir.load(bad / "model.onnx")).model, bad / "model.ort.onnx")
    write_manifest(bad, replace(opened.manifest, files=file_entries(bad)))
    found = bisect(good, bad)
    assert found is not None
    assert (found.kind, found.name) == ("pass", name), found.lines()
    assert where in found.where, found.lines()


@pytest.mark.parametrize(
    "tensor",
    cases(
        {"q": "model.layers.1.self_attn.q_proj.weight.T", "norm": "model.norm.weight"},
        always=["q"],
    ),
)
def test_the_weight_is_named(tensor: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = shared_bundle("doge-tiny", **DENSE)
    bad = own_bundle(tmp_path / "bad", "doge-tiny", **DENSE)
    manifest = open_bundle(bad).manifest
    edit_tensor(bad / WEIGHTS_FILE, tensor, one_percent)
    write_manifest(bad, replace(manifest, files=file_entries(bad)))
    assert run_command(["bisect", str(good), str(bad)]) == 1
    captured = capfd.readouterr()
    assert captured.out.startswith(f"the weight {tensor} makes the difference"), captured.out
    assert f"weight {tensor}" in captured.err


def test_the_first_of_several_weights_is_found_by_halving(tmp_path: Path) -> None:
    good = shared_bundle("doge-tiny", **DENSE)
    bad = own_bundle(tmp_path / "bad", "doge-tiny", **DENSE)
    manifest = open_bundle(bad).manifest
    # the first differs where no number is ever read: positions beyond the text
    edit_tensor(bad / WEIGHTS_FILE, "rope_cos", lambda table: table[-1].mul_(2))
    for layer in (2, 1):
        edit_tensor(bad / WEIGHTS_FILE, f"model.layers.{layer}.mlp.up_proj.weight.T", one_percent)
    write_manifest(bad, replace(manifest, files=file_entries(bad)))
    found = bisect(good, bad)
    assert found is not None
    assert (found.kind, found.name) == ("weight", "model.layers.1.mlp.up_proj.weight.T"), found.lines()
    assert "2 more tensors differ" in found.detail


def test_equal_bundles_do_not_differ(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = shared_bundle("doge-tiny", **DENSE)
    bad = own_bundle(tmp_path / "copy", "doge-tiny", **DENSE)
    assert run_command(["bisect", str(good), str(bad)]) == 0
    assert capfd.readouterr().out.split() == f"{bad} computes what {good} computes".split()


def test_options_are_named_first(tmp_path: Path) -> None:
    found = bisect(shared_bundle("doge-tiny", **DENSE), shared_bundle("doge-tiny", quantize="int8"))
    assert found is not None
    assert (found.kind, found.name) in {("option", name) for name in ("logits", "quantize", "block_size")}


def test_another_checkpoint_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="different checkpoints"):
        bisect(shared_bundle("doge-tiny", **DENSE), shared_bundle("doge-tiny-moe", **DENSE))


def test_one_environment_is_like_itself() -> None:
    good = shared_bundle("doge-tiny", **DENSE)
    assert bisect(good, good, good_python=sys.executable, bad_python=sys.executable) is None


def test_an_environment_that_cannot_run_the_bundle_is_named(tmp_path: Path) -> None:
    good = shared_bundle("doge-tiny", **DENSE)
    with pytest.raises(MissingDependencyError, match="/nowhere/python cannot be run"):
        bisect(good, good, good_python="/nowhere/python")
    other = shutil.which("false") or "/bin/false"
    with pytest.raises(MissingDependencyError, match="cannot run the bundle"):
        bisect(good, good, bad_python=other)
