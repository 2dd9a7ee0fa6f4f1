"""Builds: real ones with TensorRT-RTX, and what is left when one breaks down or is killed."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from bundles import NoProgress, make_bundle, own_bundle, shared_bundle
from engine_stand_ins import made_up_record
from random_doge import save_random_doge
from sweeps import cases

from doge_deploy.bundle import engine_store
from doge_deploy.bundle.engine_record import EngineRecord
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.signature import bounded
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.cli.main import run_command
from doge_deploy.errors import BrokenBundleError, MissingDependencyError, UnsupportedModelError, UsageError
from doge_deploy.options.build import BuildOptions
from doge_deploy.pipelines import build as building
from doge_deploy.pipelines.build import build
from doge_deploy.targets.trt import choices, layout, vendor
from doge_deploy.targets.trt import run as run_module


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """doge-tiny in fp16, static, without engines."""
    return own_bundle(tmp_path / "bundle", "doge-tiny", dtype="fp16")


def run(path: Path, *, force: bool = False, **options: Any) -> EngineRecord:
    return build(path, BuildOptions(**options), force=force, progress=NoProgress())


def without_engine(path: Path) -> None:
    """The bundle is whole, and nothing of a build is left in it."""
    assert open_bundle(path).manifest.engines == {}
    assert not (path / "engines").exists()


@pytest.fixture
def short_bundle(tmp_path: Path) -> Path:
    """The same for texts of no more than its window."""
    return own_bundle(tmp_path / "bundle", "doge-tiny", dtype="fp16", max_length=64)


@pytest.mark.tensorrt
def test_an_engine_and_its_record(short_bundle: Path) -> None:
    bundle = short_bundle
    record = run(bundle, compute_capabilities=["8.9"])
    opened = open_bundle(bundle)
    assert opened.engine() == record == opened.manifest.engines["trt-rtx-fp16-sm89"]
    assert opened.manifest.files[record.engine_file]["bytes"] == record.engine_bytes
    signature = opened.layout("static").signature
    assert [tensor.name for tensor in record.inputs] == [spec.name for spec in signature.inputs]
    assert [(t.dtype, t.shape) for t in record.inputs] == [(s.dtype, s.shape) for s in signature.inputs]
    assert [(t.dtype, t.shape) for t in record.outputs] == [(s.dtype, s.shape) for s in signature.outputs]
    assert record.layers.kv_cache_update == len(record.aliases) == 9
    assert record.layers.attention == 3
    assert record.layers.decomposed == ()
    assert record.kernels is not None
    assert record.kernels.fused_attention == 3
    assert "TF32" not in record.flags
    assert record.onnx.sha256 == opened.manifest.files["model.onnx"]["sha256"]
    assert record.peak_memory_bytes > record.engine_bytes
    assert record.activation_bytes
    assert record.window is None and record.networks == (record,)


@pytest.mark.tensorrt
def test_an_engine_that_holds_the_window(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["build", str(bundle), "--compute-capability", "8.9", "--batch-size", "1,1,2"]) == 0
    assert "a cache of 64 slots, its keep_window_size" in capfd.readouterr().out
    opened = open_bundle(bundle)
    record, signature = opened.engine(), opened.layout("static").signature
    assert record.window == 64 and record.prefill is not None
    for network, decode in zip(record.networks, (True, False), strict=True):
        expected = bounded(signature, 64, decode=decode)
        assert [(t.name, t.dtype, t.shape) for t in network.inputs] == [
            (s.name, s.dtype, s.shape) for s in expected.inputs
        ]
        assert [(t.name, t.dtype, t.shape) for t in network.outputs] == [
            (s.name, s.dtype, s.shape) for s in expected.outputs
        ]
        assert opened.manifest.files[network.engine_file]["bytes"] == network.engine_bytes
        assert network.layers.attention == 3 and network.layers.decomposed == ()
        assert network.kernels is not None and network.kernels.fused_attention == 3
        assert network.profiles[0].axes["batch_size * key_heads"].max == 4
    assert record.layers.kv_cache_update == len(record.aliases) == 9
    assert record.prefill.layers.kv_cache_update == len(record.prefill.aliases) == 0
    assert [profile.name for network in record.networks for profile in network.profiles] == ["decode", "prefill"]
    engine = bundle / record.directory
    assert sorted(file.name for file in engine.iterdir()) == [
        "layers.json",
        "model.engine",
        "prefill.engine",
        "prefill_layers.json",
    ]
    assert run_command(["inspect", str(engine)]) == 0
    text = " ".join(capfd.readouterr().out.split())
    assert "cache 64 slots, its keep_window_size" in text and "prefill.engine" in text
    assert run_command(["inspect", str(engine), "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert len(data["prefill_report"]["network"]) == record.prefill.layers.total
    (engine / "prefill.engine").write_bytes(b"")
    assert run_command(["inspect", str(engine)]) == 3
    assert "prefill.engine was altered" in capfd.readouterr().err


@pytest.mark.tensorrt
def test_a_window_beyond_top_k_builds(tmp_path: Path) -> None:
    """No network ranks more keys than a call of its prefill has tokens."""
    checkpoint = save_random_doge(tmp_path / "wide", keep_window_size=8192, max_position_embeddings=16384)
    path = make_bundle(checkpoint, tmp_path / "bundle", dtype="fp16")
    record = run(path)
    assert record.window == 8192 and record.prefill is not None


@pytest.mark.tensorrt
def test_inspect_shows_the_engine(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(bundle)
    capfd.readouterr()
    engine = bundle / "engines" / "trt-rtx-fp16-portable"
    assert run_command(["inspect", str(bundle)]) == 0
    assert "engine trt-rtx-fp16-portable: TensorRT-RTX" in capfd.readouterr().out
    for path in (engine, engine / "model.engine"):
        assert run_command(["inspect", str(path)]) == 0
        text = " ".join(capfd.readouterr().out.split())
        assert "3 native layers; 3 of 3 (one per layer and profile) run as one kernel" in text
        assert "KV_CACHE_UPDATE │ 9" in text
    assert run_command(["inspect", str(engine), "--layers"]) == 0
    assert "Attention_2" in capfd.readouterr().out
    assert run_command(["inspect", str(engine), "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["record"]["layers"]["attention"] == 3
    assert len(data["report"]["network"]) == data["record"]["layers"]["total"]
    assert run_command(["inspect", str(bundle), "--layers"]) == 2
    (engine / "model.engine").write_bytes(b"")
    assert run_command(["inspect", str(engine)]) == 3
    assert "model.engine was altered" in capfd.readouterr().err


@pytest.mark.tensorrt
def test_fp32_decomposes_its_attention_and_says_why(tmp_path: Path) -> None:
    record = run(own_bundle(tmp_path / "bundle", "doge-tiny", max_length=64))
    assert [layer.layer for layer in record.layers.decomposed] == ["Attention_0", "Attention_1", "Attention_2"]
    assert "no fused kernel for these heads and this dtype" in record.layers.decomposed[0].reason
    assert "TF32" not in record.flags


@pytest.mark.tensorrt
def test_a_mixture_of_experts_builds(tmp_path: Path) -> None:
    path = own_bundle(tmp_path / "moe", "doge-tiny-moe", dtype="bf16")
    record = run(path, batch_size=[1, 2, 4])
    assert record.prefill is not None
    assert record.prefill.profile_for(batch_size=4, sequence_length=512) == 0


@pytest.mark.tensorrt
def test_two_profiles(short_bundle: Path) -> None:
    record = run(short_bundle, profiles="separate", batch_size=[1, 2, 4])
    assert [profile.name for profile in record.profiles] == ["prefill", "decode"]
    assert record.profile_for(batch_size=4, sequence_length=1) == 1


@pytest.mark.tensorrt
def test_an_engine_is_replaced_only_with_force(bundle: Path) -> None:
    first = run(bundle)
    with pytest.raises(UsageError, match="has an engine trt-rtx-fp16-portable; replace it with --force"):
        run(bundle)
    second = run(bundle, force=True, verbosity="none")
    opened = open_bundle(bundle)
    assert opened.engine() == second != first
    assert second.kernels is None
    assert [path.name for path in (bundle / "engines").iterdir()] == ["trt-rtx-fp16-portable"]


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"compute_capabilities": ["8.7"]}, UsageError, r"cannot build for 8.7; known: 7.5, 8.0, 8.6"),
        ({"compute_capabilities": ["7.5"]}, UnsupportedModelError, r"for Turing \(SM75\): FP32 GEMM is not supported"),
        ({"strip_weights": True}, MissingDependencyError, "needs a CUDA device to strip weights"),
        ({"sequence_length": 4096}, UsageError, "a call of 4096 tokens does not fit"),
        ({"timing_cache": "t.cache"}, UsageError, "TensorRT-RTX measures no kernels"),
        ({"profiles": "shared"}, UsageError, "profiles=shared: a text of 512 tokens can exceed the window of 64, so"),
    ],
    ids=["unknown-device", "turing", "strip-weights", "too-long", "timing-cache", "one-profile"],
)
def test_what_cannot_be_built_leaves_nothing(
    bundle: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        run(bundle, **options)
    assert "\n" not in str(caught.value)
    without_engine(bundle)


def test_a_bundle_without_static_layout_is_refused(dense_doge: Path) -> None:
    path = shared_bundle(dense_doge, kv_cache=("growing",))
    with pytest.raises(UsageError, match="has no 'static' layout; it holds: growing"):
        run(path)


def test_quantized_weights_are_refused() -> None:
    path = shared_bundle("doge-tiny", quantize="int8", max_length=64)
    with pytest.raises(UnsupportedModelError, match=r"stores its weights as int8, .* export without --quantize"):
        run(path)


def test_weights_of_few_bits_are_built_where_it_shows(tmp_path: Path) -> None:
    path = own_bundle(tmp_path / "b", "doge-tiny", quantize="int4", dtype="fp16", max_length=64)
    with pytest.raises(UsageError, match=r"verbosity=none with int4 weights: .* comes with verbosity=detailed only"):
        run(path, verbosity="none")


FEW_BITS = {
    "int4-fp16": ("doge-tiny", {"quantize": "int4", "dtype": "fp16"}),
    "int4-bf16-moe": ("doge-tiny-moe", {"quantize": "int4", "dtype": "bf16"}),
    "int4-fp16-moe": ("doge-tiny-moe", {"quantize": "int4", "dtype": "fp16"}),
    "fp8-fp16": ("doge-tiny", {"quantize": "fp8", "dtype": "fp16"}),
    "fp8-bf16-moe": ("doge-tiny-moe", {"quantize": "fp8", "dtype": "bf16"}),
    "nvfp4-fp16": ("doge-tiny", {"quantize": "nvfp4", "dtype": "fp16"}),
    "nvfp4-bf16-moe": ("doge-tiny-moe", {"quantize": "nvfp4", "dtype": "bf16"}),
}
NARROW = {"int4": "Int4", "fp8": "FP8", "nvfp4": "FP4E2M1"}
"""What the builder calls the numbers."""


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("model", "options"), cases(FEW_BITS, ["int4-fp16", "int4-bf16-moe", "fp8-bf16-moe", "nvfp4-fp16"])
)
def test_kernels_read_weights_as_they_are_stored(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = own_bundle(tmp_path / "b", model, **options, max_length=64)
    record = run(path)
    assert record.kernels is not None and record.kernels.low_bit >= 12
    report = json.loads((path / record.report_file).read_text())
    narrow = NARROW[options["quantize"]]
    products = [kernel for kernel in report["kernels"] if kernel["type"] == "gemm"]
    narrow_sides = {sum(read["dtype"] == narrow for read in kernel["inputs"]) for kernel in products}
    assert narrow_sides == ({0} if options["quantize"] == "int4" else {0, 2}), "dt_proj, and both sides of the others"
    assert any(read["dtype"] == narrow for kernel in report["kernels"] for read in kernel["inputs"])
    assert record.weight_bytes < 0.7 * plain_weight_bytes(model)


@pytest.mark.parametrize(("kind", "older", "first"), [("fp8", "8.6", "8.9"), ("nvfp4", "8.9", "12.0")])
def test_devices_that_cannot_compute_with_such_weights(
    kind: str, older: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own_bundle(tmp_path / "b", "doge-tiny", quantize=kind, dtype="fp16", max_length=64)
    with pytest.raises(
        UsageError, match=f"compute_capabilities={older}: {kind} weights need compute capability {first} or later"
    ) as caught:
        run(path, compute_capabilities=[older, "12.0"])
    assert caught.value.exit_code == 2
    without_engine(path)
    bundle = open_bundle(path)
    covered = choices.resolve_capabilities(bundle, BuildOptions(target="trt-rtx"))
    assert covered == {"fp8": ("8.9", "12.0"), "nvfp4": ("12.0",)}[kind]
    monkeypatch.setattr(choices, "device_capability", lambda: older)
    with pytest.raises(UsageError, match=f"device .* capability {older}: {kind} weights need {first} or later"):
        choices.resolve_capabilities(bundle, BuildOptions(target="trt"))


def plain_weight_bytes(model: str) -> int:
    """Of the same model in half precision."""
    return 2 * sum(math.prod(info.shape) for info in open_checkpoint(model).tensors.values())


def between_weight_and_product(node: ir.Node) -> None:
    """Two operators that change nothing, and that the builder does not fuse."""
    value = node.outputs[0]
    there = ir.node("Neg", [value])
    back = ir.node("Neg", [there.outputs[0]])
    node.graph.insert_after(node, [there, back])
    value.replace_all_uses_with(back.outputs[0])
    there.replace_input_with(0, value)


@pytest.mark.tensorrt
def test_weights_that_are_widened_in_every_call_fail_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = layout.lower

    def broken(*arguments: Any, **choices: Any) -> ir.Model:
        model = original(*arguments, **choices)
        for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
            between_weight_and_product(node)
        return model

    monkeypatch.setattr(layout, "lower", broken)
    path = own_bundle(tmp_path / "b", "doge-tiny", quantize="int4", dtype="fp16", max_length=64)
    assert run_command(["build", str(path)]) == 3
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "error" in line)
    assert "widens weights of few bits in every call instead of multiplying with them: kernel" in line
    without_engine(path)


def test_full_tensorrt_is_missing_here(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs TensorRT, which is not installed: pip install") as caught:
        run(bundle, target="trt")
    assert caught.value.exit_code == 4
    without_engine(bundle)


def test_full_tensorrt_needs_a_device(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vendor, "_cuda_driver", lambda: None)
    with pytest.raises(MissingDependencyError, match="no CUDA device was found; run it on that device"):
        run(bundle, target="trt")


def test_full_tensorrt_builds_for_its_own_device_only(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "check_installed", lambda target: None)
    monkeypatch.setattr(building, "require_gpu", lambda target: None)
    monkeypatch.setattr(choices, "device_capability", lambda: "8.7")
    with pytest.raises(UsageError, match=r"compute_capabilities=8.9: TensorRT builds for the device of .* is 8.7"):
        run(bundle, target="trt", compute_capabilities=["8.9"])


def test_an_installed_product_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "check_installed", lambda target: None)

    def broken(name: str) -> None:
        raise ImportError("libnvinfer.so.11: cannot open shared object file\nmore")

    monkeypatch.setattr(vendor.importlib, "import_module", broken)
    with pytest.raises(
        MissingDependencyError, match=r"cannot be loaded: libnvinfer.so.11: cannot open .*doge-deploy\[trt"
    ):
        vendor.import_product("trt")


CRASHES = {
    "abort": ("import os, sys; print('the cause', file=sys.stderr, flush=True); os.abort()", "was ended by signal 6"),
    "segmentation-fault": ("import ctypes; ctypes.string_at(0)", "was ended by signal 11"),
    "exit": ("import sys; sys.exit('the cause')", "ended with status 1; its log ends with: the cause"),
    "silence": ("", "ended with status 0; its log is empty"),
}


@pytest.mark.parametrize(("code", "words"), CRASHES.values(), ids=CRASHES.keys())
def test_a_library_that_breaks_down_is_an_error_with_the_end_of_its_log(
    bundle: Path, code: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "check_installed", lambda target: None)
    monkeypatch.setattr(run_module, "WORKER", (sys.executable, "-c", code))
    with pytest.raises(MissingDependencyError, match="the library of TensorRT-RTX broke down: its process") as caught:
        run(bundle)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    without_engine(bundle)


def test_two_builds_of_one_bundle_do_not_mix(bundle: Path) -> None:
    opened = open_bundle(bundle)
    with (
        engine_store.staging(opened),
        pytest.raises(UsageError, match="another build or export is writing to"),
        engine_store.staging(opened),
    ):
        pass


def stage(bundle: Path, staged: Path, content: str = "A") -> None:
    """An engine of one byte, as the record has it."""
    (staged / "model.engine").write_text(content)
    (staged / "layers.json").write_text("{}")


def record_of(bundle: Path) -> EngineRecord:
    files = open_bundle(bundle).manifest.files
    onnx = {"file": "model.onnx", "sha256": files["model.onnx"]["sha256"]}
    weights = {"file": "weights.safetensors", "sha256": files["weights.safetensors"]["sha256"]}
    return made_up_record(onnx=onnx, weights=weights)


class Killed(BaseException):
    """Ends a block as a kill would, without clean-up by `except Exception`."""


@pytest.mark.parametrize("replacing", [False, True], ids=["new engine", "replacement"])
def test_a_commit_that_is_interrupted_at_any_step_is_taken_back(
    bundle: Path, replacing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, record = open_bundle(bundle), record_of(bundle)
    if replacing:
        with engine_store.staging(opened) as staged:
            stage(bundle, staged)
            engine_store.commit(opened, staged, record)
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    steps = [(Path, "rename"), (Path, "replace"), (engine_store, "exchange"), (engine_store, "write_manifest")]
    for last in itertools.count(1):
        count = 0

        def watched(original: Any, last: int = last) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == last:
                    raise Killed
                return original(*arguments, **options)

            return call

        opened = open_bundle(bundle)
        with monkeypatch.context() as patch, engine_store.staging(opened) as staged:
            stage(bundle, staged, "B")
            for owner, name in steps:
                patch.setattr(owner, name, watched(getattr(owner, name)))
            try:
                engine_store.commit(opened, staged, record)
            except Killed:
                pass
            else:
                break
        assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before, last
    assert last > 5
    assert (bundle / record.engine_file).read_text() == "B"
    assert open_bundle(bundle).engine() == record
    assert not list((bundle / "engines").glob(".*"))


def test_a_bundle_that_was_exported_anew_meanwhile_is_not_given_the_engine(bundle: Path) -> None:
    opened, record = open_bundle(bundle), made_up_record()
    with engine_store.staging(opened) as staged, pytest.raises(BrokenBundleError, match="was replaced while"):
        stage(bundle, staged)
        engine_store.commit(opened, staged, record)
    without_engine(bundle)


@pytest.mark.tensorrt
@pytest.mark.parametrize("delay", cases({"0.4": 0.4, "0.9": 0.9, "1.4": 1.4}, always=["0.9"]))
def test_a_killed_build_leaves_the_bundle_whole(bundle: Path, delay: float) -> None:
    command = [sys.executable, "-m", "doge_deploy.cli", "build", str(bundle)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert set(open_bundle(bundle).manifest.engines) <= {"trt-rtx-fp16-portable"}
    run(bundle, force=True)
    assert [path.name for path in (bundle / "engines").iterdir()] == ["trt-rtx-fp16-portable"]


@pytest.mark.tensorrt
def test_a_polite_end_of_a_build_cleans_up(bundle: Path) -> None:
    command = [sys.executable, "-m", "doge_deploy.cli", "build", str(bundle)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (bundle / "engines").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    without_engine(bundle)
