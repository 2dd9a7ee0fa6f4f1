"""Verification must fail, and say where, when a bundle computes something else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from bundles import broken_copy, edit_tensor
from shared_recordings import shared_recording
from sweeps import cases

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.config.model import DogeFacts
from doge_deploy.graph.functions import dynamic_mask_attention
from doge_deploy.graph.schemas import CDMOE, ROUTED_EXPERTS
from doge_deploy.model.attention import hidden_bias
from doge_deploy.verify.cases import Limits, exact_cases
from doge_deploy.verify.replay import Replay
from doge_deploy.verify.runners import open_runners


def one_percent(tensor: torch.Tensor) -> None:
    """Raise the largest number of a tensor by 1%."""
    index = tensor.abs().flatten().argmax()
    tensor.view(-1)[index] *= 1.01


def attention_body(old: str, new: str, monkeypatch: pytest.MonkeyPatch, facts: DogeFacts) -> Callable[[ir.Model], None]:
    """Replace `old` by `new` in the text of the attention's body."""

    def edit(model: ir.Model) -> None:
        module = dynamic_mask_attention
        for name, text in list(vars(module).items()):
            if name.startswith("_") and isinstance(text, str) and old in text:
                monkeypatch.setattr(module, name, text.replace(old, new))
                break
        else:
            raise AssertionError(f"no text of the body has {old!r}")
        function = dynamic_mask_attention.dynamic_mask_attention_function(
            facts, has_key_mask=False, keep_window=True, hidden_bias=hidden_bias(torch.float32)
        )
        model.functions[function.identifier()] = function

    return edit


def window_plus_one(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in ("DynamicMaskAttention", "WindowBias"):
            node.attributes["keep_window_size"] = ir.AttrInt64("keep_window_size", 65)


def second_routed_as_first(model: ir.Model) -> None:
    """The second token of a call takes the router logits of the first."""
    for node in list(model.graph):
        if node.op_type not in (CDMOE, ROUTED_EXPERTS):
            continue
        bounds = {n: ir.tensor(np.array([n])) for n in (0, 1, 2, 1 << 30)}

        def emit(operator: str, *inputs: ir.Value | None, before: ir.Node = node, **attributes: int) -> ir.Value:
            made = ir.node(operator, inputs, attributes)
            model.graph.insert_before(before, made)
            return made.outputs[0]

        at = {}
        for n, tensor in bounds.items():
            constant = ir.node("Constant", [], {"value": tensor})
            model.graph.insert_before(node, constant)
            at[n] = constant.outputs[0]
        logits, axis = node.inputs[1], at[1]
        first, second = (emit("Slice", logits, at[n], at[n + 1], axis) for n in (0, 1))
        rest = emit("Slice", logits, at[2], at[1 << 30], axis)
        copied = emit("Add", first, emit("Sub", second, second))  # of no token where there is no second
        node.replace_input_with(1, emit("Concat", first, copied, rest, axis=1))


TEXTS = {"static/natural text", "static/greedy"}
"""Cases of which a recording holds what lies within the window: beyond it they tie."""


def verify(bundle: Path, capfd: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, set[str]]:
    """Exit code, output, and the cases that the error line names, of a live reference.

    A recording of that reference must come to the same verdict, and name the same cases.
    """
    code, output, cases = _verified([str(bundle), "--greedy-steps", "24", *options], capfd)
    model = "doge-tiny-moe" if open_bundle(bundle).manifest.facts.is_moe else "doge-tiny"
    recording = shared_recording(model, kv_cache=("static", "growing"), logits="all")
    recorded = _verified([str(bundle), "--recording", str(recording), *options], capfd)
    assert (recorded[0], recorded[2] - TEXTS) == (code, cases - TEXTS), recorded[1]
    assert recorded[2] <= cases, "a recording finds no fault where the reference finds none"
    return code, output, cases


def _verified(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, set[str]]:
    code = run_command(["verify", *arguments, "--layout", "static"])
    captured = capfd.readouterr()
    found = re.search(r"what transformers computes: (.*)", captured.err)
    return code, captured.out + captured.err, set(found.group(1).split(", ")) if found else set()


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.self_attn.q_proj.weight.T",
        pytest.param("model.layers.1.self_attn.k_proj.weight.T", marks=pytest.mark.sweep),
        "model.layers.1.self_attn.dt_proj.weight.T",
        pytest.param("model.layers.2.mlp.down_proj.weight.T", marks=pytest.mark.sweep),
    ],
)
def test_one_weight_off_by_one_percent(
    tensor: str, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = broken_copy(tiny_bundle, tmp_path / "b", weights=lambda path: edit_tensor(path, tensor, one_percent))
    code, output, cases = verify(broken, capfd)
    assert code == 1
    assert "weights" in cases
    assert f"{tensor}: 1 of" in output
    assert any(case.startswith("static/") for case in cases), "the numbers alone must show it too"


def test_score_term_dropped(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = open_bundle(tiny_bundle).manifest.facts
    edit = attention_body(
        "score_bias = Where (kept, row_score_cast, hidden)",
        "no_score = Sub (row_score_cast, row_score_cast)\n    score_bias = Where (kept, no_score, hidden)",
        monkeypatch,
        facts,
    )
    broken = broken_copy(tiny_bundle, tmp_path / "b", graph=edit, portable=True)
    code, output, cases = verify(broken, capfd, "--portable")
    assert code == 1
    assert "static/prefill" in cases
    assert "FAIL static/prefill: logits" in output


def test_rotation_shifted_by_one_position(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def shift(path: Path) -> None:
        for name in ("rope_cos", "rope_sin"):
            edit_tensor(path, name, lambda table: table.copy_(table.roll(1, 0)))

    code, output, cases = verify(broken_copy(tiny_bundle, tmp_path / "b", weights=shift), capfd)
    assert code == 1
    assert {"weights", "static/prefill", "static/decode"} <= cases
    assert "present.0.key" in output


@pytest.mark.parametrize("options", [(), ("--portable",)], ids=["lowered", "portable"])
def test_one_key_too_many(
    options: tuple[str, ...], tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = broken_copy(tiny_bundle, tmp_path / "b", graph=window_plus_one, portable=bool(options))
    code, _, cases = verify(broken, capfd, *options)
    assert code == 1
    assert {"static/window K=w+1", "static/window K=2w", "static/natural text"} <= cases
    assert not {"static/prefill", "static/window K=w"} & cases, "at or below the window nothing changes"


def test_two_experts_swapped(tiny_moe_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    opened = open_bundle(tiny_moe_bundle)
    facts = opened.manifest.facts
    runners = open_runners(opened, "static")
    case = next(exact_cases(Limits(facts.vocab_size, opened.manifest.max_length, facts.keep_window_size), seed=0))
    assert runners.exposed is not None
    used = Replay("right", False, False).feed(runners.exposed, case).selections[0]["experts.1"]
    first, second = np.unique(used)[:2].tolist()

    def swap(path: Path) -> None:
        rows = [second, first]
        for table in ("down_embed", "up_embed"):
            name = f"model.layers.1.mlp.{table}.weight"
            edit_tensor(path, name, lambda t: t.__setitem__([first, second], t[rows].clone()))

    code, _, cases = verify(broken_copy(tiny_moe_bundle, tmp_path / "b", weights=swap), capfd)
    assert code == 1
    assert {"weights", "static/prefill"} <= cases


@pytest.mark.parametrize("options", cases({"lowered": ((),), "portable": (("--portable",),)}, always=["lowered"]))
def test_token_routed_with_its_neighbours_scores(
    options: tuple[str, ...], tiny_moe_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = broken_copy(tiny_moe_bundle, tmp_path / "b", graph=second_routed_as_first, portable=bool(options))
    code, output, cases = verify(broken, capfd, *options)
    assert code == 1
    assert "static/prefill" in cases
    assert re.search(r"FAIL static/prefill: .*(select other|experts\.0)", output)


def test_nan_fails_and_is_counted(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def poison(path: Path) -> None:
        edit_tensor(path, "model.norm.weight", lambda t: t.__setitem__(3, float("nan")))

    code, output, cases = verify(broken_copy(tiny_bundle, tmp_path / "b", weights=poison), capfd)
    assert code == 1
    assert "static/prefill" in cases
    assert "NaN or infinite numbers" in output


def test_untouched_bundles_pass(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, output, cases = verify(broken_copy(tiny_bundle, tmp_path / "b"), capfd)
    assert (code, cases) == (0, set()), output
