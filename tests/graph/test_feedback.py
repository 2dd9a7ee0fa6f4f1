"""Numbers of 4 bits that are chosen on a text: against a plain loop, against transformers, and in bundles."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bundles import make_bundle, own_bundle, shared_bundle
from torch import nn

import doge_deploy
from doge_deploy.bundle.files import CALIBRATION_TOKENS, WEIGHTS_FILE
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.find import find_checkpoint
from doge_deploy.checkpoint.tokenizer import encode
from doge_deploy.errors import BrokenBundleError
from doge_deploy.graph.covariances import input_covariances
from doge_deploy.graph.feedback import MOST_TOKENS, choose_numbers, read_tokens, write_tokens
from doge_deploy.graph.weight_formats import format_of, weight_formats
from doge_deploy.graph.weight_formats._feedback import DAMPENING, column_order, scales_with_feedback
from doge_deploy.graph.weight_formats._scales import STARTS, positive_scales, short_scale
from doge_deploy.graph.weight_formats.int4 import Format
from doge_deploy.options.export import ExportOptions
from doge_deploy.text.calibration import CALIBRATION
from doge_deploy.verify.recording.subject import first_difference, subject_of
from doge_deploy.verify.reference import Reference
from doge_deploy.verify.stored import weight_format_of
from doge_deploy.verify.weights import compare_weights

Array = npt.NDArray[np.float64]


def correlated(columns: int, *, rank: int, seed: int = 0) -> torch.Tensor:
    """Covariance of inputs that vary together, and not all equally."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, rank, generator=draw, dtype=torch.float64) @ torch.randn(
        rank, columns, generator=draw, dtype=torch.float64
    )
    inputs = inputs + 0.3 * torch.randn(200, columns, generator=draw, dtype=torch.float64)
    return inputs.T @ inputs / 200


def short(scale: float, dtype: str) -> float:
    return float(short_scale(torch.tensor([scale], dtype=torch.float64), dtype))


def feed_back(left: Array, inverse: Array, scale: float, columns: list[int]) -> tuple[Array, Array, Array, float]:
    """One row, one block, column by column: numbers, what is left of the row, what is left of the inverse, the loss."""
    left, inverse = left.copy(), inverse.copy()
    values, loss = np.zeros(len(columns)), 0.0
    for place, column in enumerate(columns):
        values[place] = np.clip(np.round(left[column] / scale), -8, 7)
        error = left[column] - values[place] * scale
        loss += error**2 / inverse[column, column]
        left -= error / inverse[column, column] * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return values, left, inverse, loss


def plain_loop(weight: Array, covariance: Array, block: int, dtype: str) -> tuple[Array, Array]:
    """The same by the inverse itself, from which a row and a column are taken away for each column that is rounded."""
    columns = weight.shape[1]
    mean = covariance.diagonal().mean()
    dampened = covariance / mean + DAMPENING * np.eye(columns)
    power = covariance.diagonal().reshape(-1, block)
    blocks = np.argsort(-power.sum(1), kind="stable")
    values, scales = np.zeros_like(weight), np.zeros((len(weight), columns // block))
    for row in range(len(weight)):
        left, inverse = weight[row], np.linalg.inv(dampened)
        for index in blocks:
            own = [int(index) * block + int(place) for place in np.argsort(-power[index], kind="stable")]
            metric = np.linalg.inv(inverse[np.ix_(own, own)])
            best: tuple[Any, ...] | None = None
            whole = max(left[own].max() / 7, left[own].min() / -8)
            found = []
            for start in STARTS:
                scale = short(whole * start, dtype)
                for turn in range(2):
                    result = feed_back(left, inverse, scale, own)
                    found.append((turn, scale, result))
                    numbers = result[0]
                    size = numbers @ metric @ numbers
                    fitted = numbers @ metric @ left[own] / size if size else 0.0
                    scale = short(fitted, dtype) if fitted > 0 else scale
            for turn in (0, 1):
                for one in found:
                    if one[0] == turn and (best is None or one[2][3] < best[2][3] - 1e-15):
                        best = one
            assert best is not None
            values[row, own], left, inverse = best[2][:3]
            scales[row, index] = best[1] if best[2][0].any() else 1.0
    return values, scales


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("columns", "block"), [(64, 16), (32, 32)])
def test_numbers_are_those_of_a_plain_loop(columns: int, block: int, dtype: str) -> None:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(1))
    covariance = correlated(columns, rank=8)
    values, scales = scales_with_feedback(weight, covariance, block, dtype)
    expected = plain_loop(weight.double().numpy(), covariance.numpy(), block, dtype)
    assert np.array_equal(values.numpy(), expected[0])
    assert np.array_equal(scales.double().numpy(), expected[1])


def loss(weight: torch.Tensor, parts: tuple[torch.Tensor, torch.Tensor], covariance: torch.Tensor) -> float:
    block = weight.shape[1] // parts[1].shape[1]
    error = (parts[0].reshape(weight.shape) * parts[1].float().repeat_interleave(block, 1) - weight).double()
    return float((error @ covariance * error).sum())


def test_products_err_less_than_with_the_best_scales_alone() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    covariance = correlated(128, rank=32)
    plain = positive_scales(weight.reshape(32, 4, 32), "float16")
    found = scales_with_feedback(weight, covariance, 32, "float16")
    assert loss(weight, found, covariance) < 0.5 * loss(weight, plain, covariance)
    # and the error of the weights themselves grows, but not without limit
    unit = torch.eye(128, dtype=torch.float64)
    assert loss(weight, plain, unit) < loss(weight, found, unit) < 4 * loss(weight, plain, unit)


def test_inputs_that_vary_alone_leave_nothing_to_make_up_for() -> None:
    """Then the numbers are those of `positive_scales`."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    values, scales = scales_with_feedback(weight, torch.eye(64, dtype=torch.float64), 32, "float16")
    expected = positive_scales(weight.reshape(16, 2, 32), "float16")
    assert torch.equal(values, expected[0].reshape(16, 64)) and torch.equal(scales, expected[1])


def test_the_largest_inputs_come_first_and_blocks_stay_together() -> None:
    covariance = torch.diag(torch.tensor([1.0, 4, 2, 3, 9, 9, 0, 0], dtype=torch.float64))
    assert column_order(covariance, 4).tolist() == [4, 5, 6, 7, 1, 3, 2, 0]


@pytest.mark.parametrize("dead", ["nothing", "a-block", "columns", "all"])
def test_inputs_that_are_never_there_and_rows_of_zeros(dead: str) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    weight[0], weight[1, :32], weight[2] = 0, 0, 1e-9
    covariance = correlated(64, rank=4)
    where = {"nothing": [], "a-block": range(32, 64), "columns": [0, 5, 40], "all": range(64)}[dead]
    covariance[list(where)] = 0
    covariance[:, list(where)] = 0
    values, scales = scales_with_feedback(weight, covariance, 32, "float16")
    assert torch.isfinite(values).all() and torch.isfinite(scales).all() and (scales > 0).all()
    assert values.min() >= -8 and values.max() <= 7
    assert (values[0] == 0).all() and (scales[0] == 1).all()
    found = values * scales.float().repeat_interleave(32, 1)
    assert torch.equal(found, found.half().float()), "number times scale is exact"
    assert (found - weight)[3:].square().mean() < 0.05


def covariances_of_transformers(name: str, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    model = Reference(open_checkpoint(name), "float32").model
    found: dict[str, torch.Tensor] = {}

    def note(weight: str, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].double().flatten(0, -2)
        found[weight] = found.get(weight, torch.zeros(())) + x.T @ x / sum(map(len, rows))

    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(note, f"{module_name}.weight"))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    return found


def tokens(name: str, count: int) -> list[int]:
    ids = encode(open_checkpoint(name), CALIBRATION)
    assert ids is not None
    return list(ids[:count])


ROWS = {
    "all-keys-kept": (tokens("doge-tiny", 100), 60),
    "keys-dropped": (torch.randperm(1024, generator=torch.Generator().manual_seed(4))[:200].tolist(), 512),
}
"""Ids and the length of a row. Where keys are dropped no token comes twice: equal ones would tie."""


@pytest.mark.parametrize("name", ["doge-tiny", "doge-tiny-moe"])
@pytest.mark.parametrize(("ids", "length"), ROWS.values(), ids=ROWS.keys())
def test_covariances_are_those_of_transformers(ids: list[int], length: int, name: str) -> None:
    found: dict[str, torch.Tensor] = {}
    for layer in input_covariances(open_checkpoint(name), ids, routing="reference", max_length=length):
        assert all(covariance.dtype == torch.float64 for covariance in layer.values())
        found |= layer
    expected = covariances_of_transformers(name, [ids[at : at + length] for at in range(0, len(ids), length)])
    expected["model.embed_tokens.weight"] = expected.pop("lm_head.weight")
    kept = {weight for weight in expected if "dt_proj" in weight or "router_gate" in weight}
    assert found.keys() == expected.keys() - kept
    for weight, covariance in found.items():
        size = float(expected[weight].diagonal().mean())
        torch.testing.assert_close(covariance, expected[weight], rtol=1e-3, atol=1e-3 * size, msg=weight)
    assert found["model.layers.0.self_attn.q_proj.weight"] is found["model.layers.0.self_attn.v_proj.weight"]


@pytest.mark.parametrize("name", ["doge-tiny", "doge-tiny-moe"])
def test_threads_change_no_number(name: str) -> None:
    ids, before, found = tokens(name, 512), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            chosen = choose_numbers(
                open_checkpoint(name), ids, Format(dtype="fp16"), routing="reference", max_length=512
            )
        finally:
            torch.set_num_threads(before)
        found.append(chosen)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 3 * 7 + 1
    for weight, parts in found[0].items():
        assert all(torch.equal(part, found[1][weight][key]) for key, part in parts.items()), weight


@pytest.mark.parametrize("name", weight_formats())
def test_a_covariance_matters_to_the_formats_that_say_so(name: str) -> None:
    found = weight_formats()[name]
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    product = "model.layers.0.mlp.up_proj.weight"
    for dtype in found.dtypes:
        stored_as = found(dtype=dtype)
        plain, by = stored_as.store(weight, product), stored_as.store_by(weight, correlated(64, rank=8), product)
        assert plain.keys() == by.keys()
        same = all(torch.equal(plain[key].float(), by[key].float()) for key in plain)
        assert same is not stored_as.uses_covariances


@pytest.mark.parametrize("name", ["doge-tiny", "doge-tiny-moe"])
def test_a_bundle_holds_what_its_own_tokens_give(name: str) -> None:
    bundle = open_bundle(shared_bundle(name, quantize="int4", dtype="fp16", max_length=64))
    checkpoint = open_checkpoint(name)
    assert read_tokens(bundle.path, 1024) == tokens(name, MOST_TOKENS)
    count = len(tokens(name, MOST_TOKENS))
    said = f"numbers of 4 bits are chosen on {count:,} tokens, {CALIBRATION_TOKENS}"
    assert count > 800 and said in bundle.layout("static").notes
    found = compare_weights(bundle, checkpoint, weight_format_of(bundle, checkpoint))
    assert not found.failures
    without = compare_weights(bundle, checkpoint, format_of(bundle.manifest.options))
    assert len(without.failures) > 20, "the same without a text"


def test_another_text_gives_other_numbers_and_another_recording(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A list is a mutable sequence. " * 400, encoding="utf-8")
    given, options = tmp_path / "b", ExportOptions(quantize="int4", dtype="fp16", max_length=64)
    doge_deploy.export("doge-tiny", given, options, calibration_text=text)
    usual = shared_bundle("doge-tiny", quantize="int4", dtype="fp16", max_length=64)
    assert (given / WEIGHTS_FILE).read_bytes() != (usual / WEIGHTS_FILE).read_bytes()
    bundle = open_bundle(given)
    ids = encode(open_checkpoint("doge-tiny"), text.read_text(encoding="utf-8"))
    assert ids is not None and read_tokens(given, 1024) == list(ids[:MOST_TOKENS])
    checkpoint = open_checkpoint("doge-tiny")
    assert not compare_weights(bundle, checkpoint, weight_format_of(bundle, checkpoint)).failures
    found = first_difference(subject_of(open_bundle(usual).manifest), subject_of(bundle.manifest))
    assert found is not None and found.startswith("calibration is")


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(find_checkpoint("doge-tiny") / file, folder)
    path = make_bundle(str(folder), tmp_path / "b", quantize="int4", dtype="fp16", max_length=64)
    bundle = open_bundle(path)
    warning = "numbers of 4 bits are chosen without a text: the checkpoint has no tokenizer"
    assert warning in bundle.manifest.warnings and CALIBRATION_TOKENS not in bundle.manifest.files
    checkpoint = open_checkpoint(str(folder))
    assert not compare_weights(bundle, checkpoint, weight_format_of(bundle, checkpoint)).failures


@pytest.mark.parametrize("text", ["{", "[]", '{"tokens": []}', '{"tokens": [1024]}', '{"tokens": [true]}', '{"a": 1}'])
def test_tokens_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_TOKENS).write_text(text, encoding="utf-8")
    with pytest.raises(BrokenBundleError, match=r"calibration.json: must be .* ids from 0 to 1023"):
        read_tokens(tmp_path, 1024)
    write_tokens(tmp_path, [3, 1023])
    assert read_tokens(tmp_path, 1024) == [3, 1023]
    assert json.loads((tmp_path / CALIBRATION_TOKENS).read_text(encoding="utf-8")) == {"tokens": [3, 1023]}


def test_altered_tokens_are_found_before_anything_is_chosen(tmp_path: Path) -> None:
    path = own_bundle(tmp_path / "b", "doge-tiny", quantize="int4", dtype="fp16", max_length=64)
    write_tokens(path, [1, 2, 3])
    with pytest.raises(BrokenBundleError, match=r"calibration.json was altered"):
        open_bundle(path)
