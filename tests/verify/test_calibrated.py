"""int4 bundles in fp32 whose numbers were chosen on a text: exact, judged, and whatever is wrong in them is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import broken_copy, edit_bytes, make_bundle, shared_bundle
from random_doge import SMALL, save_random_doge
from sweeps import cases

from doge_deploy.bundle.files import CALIBRATION_TOKENS, WEIGHTS_FILE
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.find import find_checkpoint
from doge_deploy.cli.main import run_command
from doge_deploy.errors import BrokenBundleError, UsageError
from doge_deploy.graph.feedback import choose_numbers, write_tokens
from doge_deploy.graph.weight_formats.int4 import Format
from doge_deploy.options.export import ExportOptions
from doge_deploy.verify.recording.subject import first_difference, subject_of
from doge_deploy.verify.run import verify
from doge_deploy.verify.stored import weight_format_of
from doge_deploy.verify.weights import compare_weights


def calibrated(name: str = "doge-tiny", **options: Any) -> Path:
    return shared_bundle(name, quantize="int4", calibrate=True, max_length=64, **options)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "both-layouts": ("doge-tiny", {"kv_cache": ("static", "growing")}),
    "zero-points": ("doge-tiny", {"symmetric": False}),
    "mixture": ("doge-tiny-moe", {}),
    "mixture-zero-points": ("doge-tiny-moe", {"symmetric": False}),
    "blocks-of-64": ("doge-tiny", {"block_size": 64}),
}


@pytest.mark.parametrize(("name", "options"), cases(KINDS, ["both-layouts", "zero-points", "mixture"]))
def test_a_calibrated_bundle_is_exact_and_loses_less(name: str, options: dict[str, Any]) -> None:
    bundle = calibrated(name, **options)
    report = verify(bundle, greedy_steps=1)
    assert report.passed, (report.failed_cases, report.quality)
    assert report.graphs["static"] == "model.ort.onnx"
    alike = {key: value for key, value in options.items() if key != "kv_cache"}
    (plain,) = verify(shared_bundle(name, quantize="int4", max_length=64, **alike), greedy_steps=1).quality
    assert all(0 < quality.mean_kl < plain.mean_kl for quality in report.quality)
    manifest = open_bundle(bundle).manifest
    assert manifest.options.calibrate is True and CALIBRATION_TOKENS in manifest.files


def test_a_head_of_its_own_is_calibrated_and_its_embedding_is_not(tmp_path: Path) -> None:
    tokenizer = find_checkpoint("doge-tiny")
    checkpoint = save_random_doge(tmp_path / "c", **{**SMALL, "vocab_size": 1024, "tie_word_embeddings": False})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, checkpoint)
    bundle = make_bundle(checkpoint, tmp_path / "b", quantize="int4", calibrate=True, max_length=64)
    report = verify(bundle, reference=str(checkpoint), greedy_steps=1)
    assert report.failed_cases == []
    opened = open_bundle(bundle)
    chosen = weight_format_of(opened, open_checkpoint(str(checkpoint)))
    assert chosen is not None and "lm_head.weight" in chosen.chosen and "model.embed_tokens.weight" not in chosen.chosen


def first_up(data: np.ndarray) -> np.ndarray:
    """The first stored number by one, or the first scale by its last bit."""
    data[0] += 1 if data[0] & 15 < 15 else -1
    return data


FAULTS: dict[str, Callable[[Path], None]] = {
    "number": lambda path: edit_bytes(path, "model.layers.1.mlp.up_proj.weight.q4", first_up),
    "scale": lambda path: edit_bytes(path, "model.layers.1.self_attn.o_proj.weight.scale", first_up),
    "zero-point": lambda path: edit_bytes(path, "model.layers.0.mlp.down_proj.weight.zero_point", first_up),
    "tokens": lambda path: write_tokens(path.parent, list(range(5, 800))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_chooses_the_numbers_anew_and_finds(fault: str, tmp_path: Path) -> None:
    bundle = calibrated(symmetric=False)
    broken = broken_copy(bundle, tmp_path / "b", weights=FAULTS[fault])
    opened, checkpoint = open_bundle(broken), open_checkpoint("doge-tiny")
    failures = compare_weights(opened, checkpoint, weight_format_of(opened, checkpoint)).failures
    assert len(failures) == 1 or (fault == "tokens" and len(failures) > 20), failures


def test_wrong_tokens_fail_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = broken_copy(calibrated(), tmp_path / "b", weights=FAULTS["tokens"])
    assert run_command(["verify", str(broken), "--greedy-steps", "1"]) == 1
    assert "weights" in capfd.readouterr().out
    altered = tmp_path / "altered"
    shutil.copytree(calibrated(), altered)
    write_tokens(altered, [1, 2, 3])
    assert run_command(["verify", str(altered)]) == 3
    assert "calibration.json was altered" in capfd.readouterr().err


def test_tokens_that_are_gone_are_missed(tmp_path: Path) -> None:
    gone = broken_copy(calibrated(), tmp_path / "b", weights=lambda path: (path.parent / CALIBRATION_TOKENS).unlink())
    with pytest.raises(BrokenBundleError, match=r"options.calibrate=True: must be False, since files does not list"):
        open_bundle(gone)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_switched_off_it_is_a_bundle_without_a_text(dtype: str, tmp_path: Path) -> None:
    off = make_bundle("doge-tiny", tmp_path / "off", quantize="int4", dtype=dtype, calibrate=False, max_length=64)
    default = shared_bundle("doge-tiny", quantize="int4", dtype=dtype, max_length=64)
    same = (off / WEIGHTS_FILE).read_bytes() == (default / WEIGHTS_FILE).read_bytes()
    assert same is (dtype == "fp32"), "the default depends on the dtype"
    manifest, other = open_bundle(off).manifest, open_bundle(default).manifest
    assert (manifest.options.calibrate, other.options.calibrate) == (False, dtype == "fp16")
    assert CALIBRATION_TOKENS not in manifest.files and manifest.warnings == ()
    assert "numbers of 4 bits are chosen without a text" in open_bundle(off).layout("static").notes
    opened, checkpoint = open_bundle(off), open_checkpoint("doge-tiny")
    assert not compare_weights(opened, checkpoint, weight_format_of(opened, checkpoint)).failures


def test_a_bundle_from_before_there_was_a_choice(tmp_path: Path) -> None:
    """Its manifest does not have the key; its tokens say that it is calibrated."""
    bundle = tmp_path / "b"
    shutil.copytree(shared_bundle("doge-tiny", quantize="int4", dtype="fp16", max_length=64), bundle)
    document = json.loads((bundle / "manifest.json").read_text())
    assert document["options"].pop("calibrate") is True
    (bundle / "manifest.json").write_text(json.dumps(document))
    opened, checkpoint = open_bundle(bundle), open_checkpoint("doge-tiny")
    assert opened.manifest.options.calibrate is None
    assert not compare_weights(opened, checkpoint, weight_format_of(opened, checkpoint)).failures


def test_a_recording_is_of_calibrated_numbers_or_of_others(tmp_path: Path) -> None:
    bundle, recording = calibrated(), tmp_path / "r"
    assert run_command(["record", str(bundle), "-o", str(recording), "--greedy-steps", "1"]) == 0
    assert run_command(["verify", str(bundle), "--recording", str(recording)]) == 0
    plain = shared_bundle("doge-tiny", quantize="int4", max_length=64)
    found = first_difference(subject_of(open_bundle(bundle).manifest), subject_of(open_bundle(plain).manifest))
    assert found is not None and found.startswith("calibration is")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "int8": (
        {"quantize": "int8", "calibrate": True},
        "calibrate=True with quantize=int8: only int4 has that choice; leave it out or give quantize=int4",
    ),
    "fp8-off": (
        {"quantize": "fp8", "dtype": "fp16", "calibrate": False},
        "calibrate=False with quantize=fp8: only int4",
    ),
    "none": ({"calibrate": True}, "calibrate=True with no quantize: only int4 has that choice"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_other_formats_refuse_it(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        make_bundle("doge-tiny", tmp_path / "b", **options)


def test_what_cannot_be_met_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(find_checkpoint("doge-tiny") / file, folder)
    text = tmp_path / "text.txt"
    text.write_text("A text.", encoding="utf-8")
    line = ["export", str(folder), "-o", str(tmp_path / "b"), "--quantize", "int4"]
    given = ["--calibration-text", str(text)]
    for more, said in (
        (["--calibrate"], "calibrate=True: the checkpoint has no tokenizer to read a text with; leave it out, or"),
        (["--dtype", "fp16", *given], f"--calibration-text {text}: the checkpoint has no tokenizer to read a text"),
        (given, "give --quantize fp8 or nvfp4, or --quantize int4 with --dtype fp16 or bf16, or with --calibrate"),
        (["--no-calibrate", *given], "--calibration-text with calibrate=False, which takes no text"),
    ):
        assert run_command([*line, *more]) == 2
        error = capfd.readouterr().err
        assert said in error and error.count("\n") == 1
        assert not (tmp_path / "b").exists()


def test_the_option_in_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.yaml"
    config.write_text("export: {quantize: int4, calibrate: true, max_length: 64}", encoding="utf-8")
    assert run_command(["export", "doge-tiny", "-o", str(tmp_path / "b"), "--config", str(config)]) == 0
    assert (tmp_path / "b" / WEIGHTS_FILE).read_bytes() == (calibrated() / WEIGHTS_FILE).read_bytes()
    config.write_text("export: {quantize: int4, calibrate: gptq}", encoding="utf-8")
    capfd.readouterr()
    assert run_command(["export", "doge-tiny", "-o", str(tmp_path / "c"), "--config", str(config)]) == 2
    assert "calibrate='gptq': must be true, false, or null for what the weight format does" in capfd.readouterr().err


def test_tables_of_experts_stay_as_they_are() -> None:
    checkpoint = open_checkpoint("doge-tiny-moe")
    stored_as = Format(dtype="fp32", calibrate=True)
    chosen = choose_numbers(checkpoint, list(range(64)), stored_as, routing="reference", max_length=64)
    tables = [name for name in checkpoint.tensors if "down_embed" in name or "up_embed" in name]
    assert tables and not set(tables) & set(chosen)
    assert ExportOptions().calibrate is None
