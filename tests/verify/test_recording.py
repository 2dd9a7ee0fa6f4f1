"""Recordings: what they hold, whom they judge, and what is said of one that is damaged."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import broken_copy, edit_tensor, own_bundle, shared_bundle
from engine_stand_ins import SHARED, held_runner
from random_doge import SMALL_MOE, shared_doge
from shared_recordings import shared_recording
from sweeps import cases

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import DogeDeployError, MismatchError, UnsupportedModelError, UsageError
from doge_deploy.runtime.trt.backend import TrtBackend
from doge_deploy.runtime.trt.runner import TrtRunner
from doge_deploy.serve.start import ServeOptions, judge, summary
from doge_deploy.verify.compare import Array, Distribution, divergences
from doge_deploy.verify.files import report_json
from doge_deploy.verify.recording import record as record_module
from doge_deploy.verify.recording.container import Tensors, read_container, write_container
from doge_deploy.verify.recording.oracle import open_recording
from doge_deploy.verify.recording.places import columns_of, held, places, step_for
from doge_deploy.verify.recording.record import record
from doge_deploy.verify.recording.schema import KIND
from doge_deploy.verify.run import verify

BASE = Path(__file__).parent.parent / "base_install.py"
WIDE = {"max_length": 64}
"""Of doge-tiny: no more tokens than its window."""


@pytest.fixture(scope="module")
def small() -> Path:
    """A checkpoint whose cases are over at once."""
    return one_layer()


def one_layer(config: dict[str, Any] | None = None) -> Path:
    return shared_doge(**{**(config or {}), "num_hidden_layers": 1, "vocab_size": 256})


def test_the_same_input_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    bundle = shared_bundle(small)
    files = [tmp_path / name for name in ("a", "b")]
    digests = [record(bundle, file, reference=str(small), greedy_steps=4)[1] for file in files]
    assert digests[0] == digests[1] and files[0].read_bytes() == files[1].read_bytes()


def test_layouts_share_what_they_have_in_common(small: Path, tmp_path: Path) -> None:
    bundle = shared_bundle(small, kv_cache=("static", "growing"))
    sizes = []
    for layouts in (("static",), ("static", "growing")):
        record(bundle, tmp_path / "r", reference=str(small), greedy_steps=4, layouts=layouts)
        sizes.append((tmp_path / "r").stat().st_size)
    assert sizes[1] < 1.4 * sizes[0]
    assert verify(bundle, recording=tmp_path / "r").passed


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "moe-reference": (SMALL_MOE, {"kv_cache": ("static", "growing")}),
    "moe-per-token": (SMALL_MOE, {"routing": "per-token", "kv_cache": ("static", "growing")}),
    "fp16": ({}, {"dtype": "fp16", "kv_cache": ("static", "growing")}),
    "bf16": ({}, {"dtype": "bf16", "logits": "all"}),
    "sliding": ({"sliding_window": 12}, {"kv_cache": ("static", "growing")}),
    "window-1": ({"keep_window_size": 1}, {}),
    "features": ({}, {"task": "features"}),
    "int4": ({}, {"quantize": "int4"}),
}


@pytest.mark.parametrize(("config", "options"), cases(KINDS, ["moe-per-token", "bf16", "sliding", "features", "int4"]))
def test_a_sound_bundle_passes(config: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = one_layer(config)
    bundle = shared_bundle(checkpoint, **options)
    recording = shared_recording(checkpoint, greedy_steps=4, **options)
    live = verify(bundle, reference=str(checkpoint), greedy_steps=4)
    found = verify(bundle, recording=recording)
    assert live.passed and found.passed, (found.failed_cases, found.skipped)
    judged = {(result.layout, result.case) for result in found.results}
    missing = {(result.layout, result.case) for result in live.results} - judged
    clear = {(result.layout, result.case) for result in live.results if result.selected != "certificate"}
    assert not missing & clear, "what a live reference judges without a certificate is in the recording"
    assert bool(found.quality) == ("quantize" in options)
    for one, other in zip(live.quality, found.quality, strict=True):
        assert other.mean_kl == pytest.approx(one.mean_kl) and other.perplexity == pytest.approx(one.perplexity)


def test_neither_torch_nor_onnx_nor_the_checkpoint_is_needed(tiny_moe_bundle: Path) -> None:
    recording = shared_recording("doge-tiny-moe", kv_cache=("static", "growing"), logits="all")
    arguments = [sys.executable, str(BASE), "cpu", "verify", str(tiny_moe_bundle), "--recording", str(recording)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "24 of 24 cases within tolerance" in done.stdout and "judged by the recording" in done.stdout


def test_without_an_onnx_package_a_wrong_selection_shows_in_the_numbers(tiny_moe_bundle: Path, tmp_path: Path) -> None:
    def swap(path: Path) -> None:
        edit_tensor(path, "model.layers.1.mlp.router_gate.weight.T", lambda t: t.copy_(t.flip(1)))

    recording = shared_recording("doge-tiny-moe", kv_cache=("static", "growing"), logits="all")
    broken = broken_copy(tiny_moe_bundle, tmp_path / "b", weights=swap)
    arguments = [sys.executable, str(BASE), "cpu", "verify", str(broken), "--recording", str(recording)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 1 and "weights, static/prefill" in done.stderr, done.stderr


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that computes what ONNX Runtime computes, and shows no selections."""

    def open_stand_in(self: TrtBackend, bundle: Bundle, *arguments: Any, **options: Any) -> TrtRunner:
        return held_runner(bundle, profiles=(SHARED,))

    monkeypatch.setattr(TrtBackend, "open", open_stand_in)
    monkeypatch.setattr(TrtBackend, "require", lambda self, bundle: None)


@pytest.mark.usefixtures("stand_in")
def test_it_judges_an_engine(tiny_bundle: Path, tiny_moe_bundle: Path) -> None:
    for model, bundle in (("doge-tiny", tiny_bundle), ("doge-tiny-moe", tiny_moe_bundle)):
        recording = shared_recording(model, kv_cache=("static", "growing"), logits="all")
        report = verify(bundle, recording=recording, backend="trt-rtx")
        assert report.passed and len(report.results) == 12 and not report.skipped


def test_it_judges_the_kernels() -> None:
    checkpoint = shared_doge(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    bundle = shared_bundle(checkpoint, max_length=20)
    recording = shared_recording(checkpoint, greedy_steps=4, max_length=20)
    report = verify(bundle, recording=recording, reference=str(checkpoint), backend="torch-kernels")
    assert report.passed and "torch-kernels" in report.graphs["static"]
    selected = {result.case: result.selected for result in report.results}
    assert selected["window K=w+1"] == "exact"


def test_export_writes_a_recording_too(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(small), "-o", str(tmp_path / "b"), "--record", str(tmp_path / "r")]
    assert run_command(arguments) == 0
    assert str(tmp_path / "r") in capfd.readouterr().out
    assert verify(tmp_path / "b", recording=tmp_path / "r").passed


def test_a_server_starts_with_what_passes_only(small: Path, tmp_path: Path) -> None:
    sound, recording = shared_bundle(small), shared_recording(small, greedy_steps=4)
    (report,) = judge([sound], ServeOptions(recordings=(recording,)))
    shown = summary(report)
    assert shown["bundle"] == str(sound) and len(shown["cases"]) == len(report.results) > 5
    assert shown["bundle_sha256"] == hashlib.sha256((sound / "manifest.json").read_bytes()).hexdigest()
    assert shown["bundle_sha256"] == report_json(report)["bundle_sha256"] and "within tolerance" in shown["verdict"]
    assert judge([sound], ServeOptions()) == []
    broken = broken_copy(
        sound,
        tmp_path / "b",
        weights=lambda path: edit_tensor(path, "model.norm.weight", lambda tensor: tensor.mul_(1.01)),
    )
    with pytest.raises(MismatchError, match=r"weights, static/prefill"):
        judge([broken], ServeOptions(recordings=(recording,)))
    with pytest.raises(UsageError, match="2 recordings for 1 bundles"):
        judge([sound], ServeOptions(recordings=(recording, recording)))


# --- whom it judges


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "fp16"}, "dtype is fp32 in the recording and fp16 in the bundle"),
    "weights": ({"quantize": "int8"}, "quantize is not set in the recording and int8 in the bundle"),
    "length": ({"max_length": 32}, "max_length is 64 in the recording and 32 in the bundle"),
    "layout": ({"kv_cache": ("growing",)}, "has no recording of the growing layout"),
}


@pytest.mark.parametrize(("options", "words"), OTHERS.values(), ids=OTHERS.keys())
def test_another_bundle_of_the_checkpoint_is_refused(
    options: dict[str, Any], words: str, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = shared_bundle(small, **options)
    line = refused(bundle, shared_recording(small, greedy_steps=4), capfd)
    assert line.count(words) == 1 and (options.keys() == {"kv_cache"} or f"record {bundle} -o FILE" in line)


def test_another_checkpoint_is_refused(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = shared_doge(1, num_hidden_layers=1, vocab_size=256)
    words = refused(shared_bundle(other), shared_recording(small, greedy_steps=4), capfd)
    assert "checkpoint is" in words


def test_another_routing_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    config, options = KINDS["moe-per-token"]
    checkpoint = one_layer(config)
    recording = shared_recording(checkpoint, greedy_steps=4, **options)
    words = refused(shared_bundle(checkpoint), recording, capfd)
    assert "routing is per-token in the recording and reference in the bundle" in words


def refused(bundle: Path, recording: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line with which a verification ends."""
    capfd.readouterr()
    code = run_command(["verify", str(bundle), "--recording", str(recording)])
    error = capfd.readouterr().err
    *progress, line = error.splitlines()
    assert code == 3 and line.startswith("doge-deploy: error: "), (code, error)
    assert all(other.endswith(" ...") for other in progress)
    return line


def test_inlined_functions_and_the_standard_graph_are_judged_by_the_same_file(small: Path) -> None:
    recording = shared_recording(small, greedy_steps=4)
    assert verify(shared_bundle(small, inline_functions=True), recording=recording).passed
    assert verify(shared_bundle(small), recording=recording, portable=True).passed


def test_weights_that_are_not_the_checkpoints_are_not_recorded(small: Path, tmp_path: Path) -> None:
    broken = broken_copy(
        shared_bundle(small),
        tmp_path / "b",
        weights=lambda path: edit_tensor(path, "model.norm.weight", lambda tensor: tensor.mul_(2)),
    )
    with pytest.raises(MismatchError, match=r"model\.norm\.weight"):
        record(broken, tmp_path / "r", reference=str(small))
    assert not (tmp_path / "r").exists()


def test_where_no_choice_is_clear_nothing_is_recorded(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module.Recorder, "_case", lambda self, layout, name: "it ties")
    with pytest.raises(UnsupportedModelError, match="nothing can be recorded: it ties"):
        record(shared_bundle(small), tmp_path / "r", reference=str(small))


@pytest.mark.parametrize("option", [["--reference", "x"], ["--adapter", "x"], ["--greedy-steps", "3"]])
def test_options_of_the_reference_are_refused(
    option: list[str], small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recording = shared_recording(small, greedy_steps=4)
    code = run_command(["verify", str(shared_bundle(small)), "--recording", str(recording), *option])
    error = capfd.readouterr().err
    assert code == 2 and option[0] in error and error.count("\n") == 1


# --- what is held of large tensors


def test_places_cover_all_channels_and_no_tile_hides() -> None:
    found = places(np.arange(512)[None].repeat(2, 0), 128, 8)
    assert found.shape == (2, 512, 16) and found.min() >= 0 and found.max() < 128
    assert all(len(set(row)) == 16 for row in found.reshape(-1, 16).tolist())
    for column in range(8):  # of tiles of 8 x 8 numbers
        for channel in range(8):
            assert (found[0, column::8] % 8 == channel).any()
    assert (found[0] != found[1]).any()
    assert places(np.array([[0, 1, 4095]]), 128, 64).tolist() == [[[47, 111], [65, 1], [3, 67]]], "as in old files"


def test_a_budget_is_kept_and_a_vector_never_lost() -> None:
    assert step_for([(1, 4, 8)], 32) == 1
    assert step_for([(1, 2048, 128)], 2**15) == 8
    assert step_for([(1, 2048, 1)], 16) == 1
    row = np.arange(24).reshape(1, 3, 8)
    assert held(row, 1, columns_of(row)) is row and held(row, 4, columns_of(row)).shape == (1, 3, 2)


@pytest.fixture
def whole(small: Path) -> Path:
    """A recording in which nothing is left out, made before the budgets are."""
    return shared_recording(small, greedy_steps=8, logits="all")


@pytest.fixture
def few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets so small that even a small model's tensors are held in part."""
    monkeypatch.setattr(record_module, "CACHE_NUMBERS", 64)
    monkeypatch.setattr(record_module, "LOGIT_NUMBERS", 512)
    monkeypatch.setattr(record_module, "LIKELIEST", 32)


@pytest.fixture
def sampled(small: Path, tmp_path: Path, whole: Path, few_numbers: None) -> tuple[Path, Path]:
    """A bundle and a recording that holds little of each tensor."""
    bundle = shared_bundle(small, logits="all")
    record(bundle, tmp_path / "sampled", reference=str(small), greedy_steps=8)
    return bundle, tmp_path / "sampled"


def test_a_recording_in_part_passes_and_finds_faults(sampled: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    bundle, recording = sampled
    assert recording.stat().st_size < 0.5 * whole.stat().st_size
    report, reference = (verify(bundle, recording=file) for file in (recording, whole))
    assert report.passed
    for part, full in zip(report.results, reference.results, strict=True):
        assert part.top1 == full.top1 and part.selected == full.selected
        assert part.kl < 1e-9
    broken = broken_copy(
        bundle,
        tmp_path / "b",
        weights=lambda path: edit_tensor(path, "model.layers.0.self_attn.v_proj.weight.T", lambda t: t.mul_(1.001)),
    )
    found = verify(broken, recording=recording)
    assert {"static/prefill", "static/decode", "static/window K=w+1"} <= set(found.failed_cases)
    (prefill,) = (result for result in found.results if result.case == "prefill")
    (value,) = (quantity for quantity in prefill.quantities if quantity.name == "present.0.value")
    assert not value.passed and len(value.difference.worst_index) == 4


def test_the_worst_place_is_one_of_the_whole_tensor(
    sampled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, recording = sampled
    oracle = open_recording(recording)
    oracle.check(open_bundle(bundle))
    case = next(case for case in oracle.recording.cases if case.name == "prefill")
    recorded = case.present["present.0.key"]
    assert recorded.step > 1
    from doge_deploy.verify.recording.oracle import RecordedExpected
    from doge_deploy.verify.replay import CandidateTrace

    expected = RecordedExpected(oracle.container, case, None)
    found = np.zeros(recorded.shapes[0], np.float32)
    (values,) = expected._values("present.0.key", recorded)
    at = places(columns_of(values), found.shape[-1], recorded.step)
    np.put_along_axis(found, at, values, axis=2)
    channel = int(at[1, 5, 0])
    found[1, 5, channel] += 3
    result = expected.difference("present.0.key", CandidateTrace([], {"present.0.key": [found]}, []))
    assert result.worst_index == (0, 1, 5, channel) and result.max_abs == pytest.approx(3, rel=1e-5)


def test_the_divergence_of_some_tokens_estimates_that_of_all() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(40, 4000)) * 2
    found = logits + generator.normal(size=logits.shape) * 0.1
    exact = divergences(found, Distribution.whole(logits)).mean()
    top = np.argsort(-logits, axis=1)[:, :64]
    spread = places(np.arange(40)[None], 4000, 4)[0]
    alone = np.stack([~np.isin(some, known) for some, known in zip(spread, top, strict=True)])
    weights = np.concatenate((alone * (4000 - 64) / alone.sum(1, keepdims=True), np.ones(top.shape)), axis=1)
    ids = np.concatenate((spread, top), axis=1)
    whole = Distribution.whole(logits)
    part = Distribution(ids, np.take_along_axis(logits, ids, axis=1), weights, whole.normalizer)
    assert divergences(found, part).mean() == pytest.approx(exact, rel=0.01)
    assert (part.best == whole.best).all()


# --- damage


def altered(recording: Path, target: Path, edit: Callable[[dict[str, Any], Tensors], object]) -> Path:
    """A copy whose document says something else, with hashes that fit: what a hostile writer could make."""
    container = read_container(recording, KIND, "a recording")
    tensors = Tensors()
    for digest in container.infos:
        array = container.read(digest, tuple("float32 float64 int64 int32 uint64".split()), "a tensor")
        assert tensors.add(array) == digest
    document = container.document
    edit(document, tensors)
    write_container(target, KIND, document, tensors)
    return target


def _first(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["cases"][0]
    return found


HOSTILE: dict[str, tuple[Callable[[dict[str, Any], Tensors], object], str]] = {
    "step-0": (lambda d, t: _first(d)["present"]["present.0.key"].update(step=0), "step=0: must be"),
    "step-beyond": (lambda d, t: _first(d)["present"]["present.0.key"].update(step=10**9), "has the shapes"),
    "huge-shape": (
        lambda d, t: _first(d)["present"]["present.0.key"].update(shapes=[[2, 10**15, 8]]),
        "numbers where",
    ),
    "negative-noise": (lambda d, t: _first(d)["output_noise"].update(rms=-1.0), "rms=-1.0: must be"),
    "no-such-tensor": (lambda d, t: _first(d)["output"].update(values="0" * 64), "is not in it"),
    "not-a-hash": (lambda d, t: _first(d)["output"].update(values="../../x"), "must be a sha256"),
    "ids-beyond-the-vocabulary": (
        lambda d, t: _first(d)["calls"][0].update(ids=t.add(np.full((1, 48), 9999))),
        "none that the bundle could be given",
    ),
    "more-tokens-than-fit": (
        lambda d, t: _first(d)["calls"][0].update(
            ids=t.add(np.zeros((1, 4096), np.int64)), lengths=t.add(np.array([4096]))
        ),
        "more tokens than a row holds",
    ),
    "no-calls": (lambda d, t: _first(d).update(calls=[]), "calls=[]: must be"),
    "empty-call": (
        lambda d, t: _first(d)["calls"][0].update(ids=t.add(np.zeros((0, 3), np.int64))),
        "none that the bundle could be given",
    ),
    "fewer-positions": (lambda d, t: _first(d).update(output_rows=[7]), "positions"),
    "unknown-key": (lambda d, t: d.update(extra=1), "unknown key"),
    "no-cases-key": (lambda d, t: d.pop("cases"), "cases is missing"),
    "nothing-held": (lambda d, t: _first(d)["output"].update(step=2), "numbers where"),
    "one-tensor-less": (lambda d, t: _first(d)["present"].pop("present.0.key"), "has no present.0.key"),
}


@pytest.mark.parametrize(("edit", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_document_that_fits_its_hash_and_not_the_bundle(
    edit: Any, words: str, small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = altered(shared_recording(small, greedy_steps=4), tmp_path / "r", edit)
    assert words in refused(shared_bundle(small), file, capfd)


def test_one_altered_byte_anywhere_is_found(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = shared_recording(small, greedy_steps=4).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = np.random.default_rng(0)
    positions = [*range(9), *generator.integers(9, header, 12), *generator.integers(header, len(data), 6)]
    for position in [*positions, len(data) - 1]:
        changed = bytearray(data)
        changed[position] ^= 0x01
        (tmp_path / "r").write_bytes(bytes(changed))
        refused(shared_bundle(small), tmp_path / "r", capfd)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file(keep: int, small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r").write_bytes(shared_recording(small, greedy_steps=4).read_bytes()[:keep])
    assert "truncated" in refused(shared_bundle(small), tmp_path / "r", capfd)


def test_other_files(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = shared_bundle(small)
    wanted = "a recording, written by `doge-deploy record BUNDLE -o FILE`"
    weights, keys = bundle / "weights.safetensors", tmp_path / "keys"
    keys.write_text("iS_cs0qcRKQZq4uaDgCCmVA7uOUCHDqW\n")
    for file in (weights, keys, bundle / "model.onnx"):
        assert refused(bundle, file, capfd).endswith(f" {file} is not {wanted}")
    (tmp_path / "deep").write_bytes(_container(b"[" * 100_000))
    refused(bundle, tmp_path / "deep", capfd)
    (tmp_path / "nan").write_bytes(_container(b'{"x": NaN}'))
    assert "no JSON" in refused(bundle, tmp_path / "nan", capfd)
    assert run_command(["verify", str(bundle), "--recording", str(tmp_path / "none")]) == 2
    assert capfd.readouterr().err.endswith(f"{tmp_path / 'none'} is not a file; give {wanted}\n")


def _container(document: bytes) -> bytes:
    metadata = {"kind": KIND, "document": document.decode(), "sha256": hashlib.sha256(document).hexdigest()}
    head = json.dumps({"__metadata__": metadata}).encode()
    return len(head).to_bytes(8, "little") + head


def test_numbers_that_a_dtype_does_not_hold_are_not_stored() -> None:
    tensors = Tensors()
    for array, dtype in ((np.array([1.0 + 2**-20]), "float16"), (np.array([2**40]), "int32")):
        with pytest.raises(ValueError, match="does not hold"):
            tensors.add(array, dtype)
    exact: Array = np.array([1.5, np.inf, -0.0])
    assert tensors.add(exact, "bfloat16")


def test_a_recording_is_written_whole_or_not_at_all(small: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises((UsageError, DogeDeployError)):
        write_container(tmp_path / "folder", KIND, {}, Tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_bundle_without_a_name_of_its_checkpoint_asks_for_it(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = own_bundle(tmp_path / "b", small)
    assert run_command(["record", str(bundle), "-o", str(tmp_path / "r")]) == 2
    assert "--reference MODEL" in capfd.readouterr().err
    assert run_command(["record", str(bundle), "-o", str(tmp_path / "no" / "r"), "--reference", str(small)]) == 2
    assert "cannot be written" in capfd.readouterr().err
