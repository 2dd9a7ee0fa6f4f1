"""Runners of engines on stand-ins (`doge_deploy.runtime.trt.in_ort`), and records of engines that nobody built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from doge_deploy.bundle.engine_record import EngineProfile, EngineRecord, EngineTensor, LayerCounts, SourceFile
from doge_deploy.bundle.files import file_entry
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.bundle.signature import BATCH, SEQUENCE
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.options.build import BuildOptions, Range
from doge_deploy.runtime.ort import open_session
from doge_deploy.runtime.trt.in_ort import HostDevice, OrtEngine
from doge_deploy.runtime.trt.plan import make_plan
from doge_deploy.runtime.trt.product import make_runner
from doge_deploy.runtime.trt.runner import TrtRunner


def axes(batch: tuple[int, int, int], sequence: tuple[int, int, int]) -> dict[str, Range]:
    return {
        axis: Range(min=sizes[0], opt=sizes[1], max=sizes[2]) for axis, sizes in ((BATCH, batch), (SEQUENCE, sequence))
    }


PREFILL = EngineProfile(name="prefill", axes=axes((1, 1, 2), (1, 32, 512)))
DECODE = EngineProfile(name="decode", axes=axes((1, 1, 4), (1, 1, 1)))
SHARED = EngineProfile(name="shared", axes=axes((1, 1, 2), (1, 1, 512)))


def pretended_record(name: str, **fields: Any) -> EngineRecord:
    """A record of no real engine: what every test needs, and `fields`."""
    common: dict[str, Any] = {
        "directory": f"engines/{name}",
        "engine_file": f"engines/{name}/model.engine",
        "report_file": f"engines/{name}/layers.json",
        "target": "trt-rtx",
        "product": "TensorRT-RTX",
        "version": "1.7.1.116",
        "platform": "linux-x86_64",
        "dtype": "fp16",
        "layout": "static",
        "lowering": "standard",
        "compute_capabilities": (),
        "flags": (),
        "strip_weights": False,
        "onnx": SourceFile(file="model.onnx", sha256="0" * 64),
        "weights": SourceFile(file="weights.safetensors", sha256="1" * 64),
        "lowered_onnx_sha256": "2" * 64,
        "options": BuildOptions(),
        "layers": LayerCounts(total=1, by_type={"CAST": 1}, kv_cache_update=0, attention=0),
        "weight_bytes": 1,
        "engine_bytes": 1,
        "build_seconds": 1.5,
        "peak_memory_bytes": 1,
    }
    return EngineRecord(**{**common, **fields})


def record_of(bundle: Bundle, **changes: Any) -> EngineRecord:
    """The record of an engine that would be built from the bundle's static graph."""
    signature = bundle.layout("static").signature

    def tensors(specs: Any) -> tuple[EngineTensor, ...]:
        return tuple(EngineTensor(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in specs)

    fields: dict[str, Any] = {
        "dtype": bundle.manifest.options.dtype,
        "profiles": (PREFILL, DECODE),
        "inputs": tensors(signature.inputs),
        "outputs": tensors(signature.outputs),
        "aliases": {present.name: past.name for past, present in signature.past()},
    }
    return pretended_record("trt-rtx-fp32", **{**fields, **changes})


def write_engine(path: Path, **changes: Any) -> EngineRecord:
    """Put an engine of no content into a bundle on disk; its record, which fits the bundle."""
    bundle = open_bundle(path)
    manifest = bundle.manifest
    target = changes.get("target", "trt-rtx")
    directory = f"engines/{target}-{manifest.options.dtype}-made-up"
    engine, report = f"{directory}/model.engine", f"{directory}/layers.json"
    (path / directory).mkdir(parents=True)
    (path / engine).write_bytes(b"engine")
    (path / report).write_text("{}")
    sources = {
        name: SourceFile(file=file, sha256=manifest.files[file]["sha256"])
        for name, file in (("onnx", bundle.layout("static").file), ("weights", "weights.safetensors"))
    }
    places = {"directory": directory, "engine_file": engine, "report_file": report, "engine_bytes": 6}
    record = record_of(bundle, **{**places, **sources, **changes})
    files = {**manifest.files, **{file: file_entry(path / file) for file in (engine, report)}}
    engines = {**manifest.engines, Path(directory).name: record}
    write_manifest(path, replace(manifest, files=files, engines=engines))
    return record


def held_runner(bundle: Bundle, *, records_itself: bool = False, **changes: Any) -> TrtRunner:
    """A real runner on a stand-in: the bundle's static graph, with a slot for each token."""
    record, device = record_of(bundle, **changes), HostDevice()
    layout = bundle.layout("static")
    session = open_session(bundle.path / layout.file, bundle.path)
    engine = OrtEngine(session, record, device, records_itself=records_itself)
    return make_runner(
        bundle.manifest, layout.signature, None, engine, device, make_plan(record, layout.signature), None
    )


def profile_axes(batch: int, low: int, high: int) -> dict[str, Range]:
    one = Range(min=1, opt=1, max=batch)
    return {"batch_size": one, "sequence_length": Range(min=low, opt=high, max=high)}


def made_up_record(**changes: Any) -> EngineRecord:
    """A record of no real engine, for tests of its readers."""
    fields: dict[str, Any] = {
        "profiles": (
            EngineProfile(name="prefill", axes=profile_axes(1, 1, 64)),
            EngineProfile(name="decode", axes=profile_axes(4, 1, 1)),
        ),
        "inputs": (EngineTensor(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length")),),
        "outputs": (EngineTensor(name="logits", dtype="float16", shape=("batch_size", 1, 256)),),
        "aliases": {"present.0.key": "past_key_values.0.key"},
        "compute_capabilities": ("8.9",),
    }
    return pretended_record("trt-rtx-fp16-sm89", **{**fields, **changes})
