"""A device and an engine without CUDA: memory is NumPy's, the engine is ONNX Runtime on the bundle's static graph.

They are as strict as the real ones, or stricter: an address must lie in memory that is alive, shapes must fit the
profile, copies must be of equal size, and recorded work is done on the addresses that it was recorded with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.bundle.engine_record import EngineProfile, EngineRecord, EngineTensor, LayerCounts, SourceFile
from doge_deploy.bundle.files import file_entry
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.bundle.signature import BATCH, SEQUENCE
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.dtypes import item_bytes
from doge_deploy.options.build import BuildOptions, Range
from doge_deploy.runtime.ort import open_session
from doge_deploy.runtime.rows import ChangingAngles
from doge_deploy.runtime.trt.device import Bytes, Device, Graph, HostMemory, Memory
from doge_deploy.runtime.trt.plan import make_plan
from doge_deploy.runtime.trt.runner import Context, Engine, TrtRunner


class HeldMemory(Memory, HostMemory):
    def __init__(self, nbytes: int, fill: int) -> None:
        self.array = np.full(nbytes, fill, np.uint8)
        self.address = int(self.array.ctypes.data)
        self.nbytes = nbytes


class HeldGraph(Graph):
    def __init__(self, device: HeldDevice, work: list[Callable[[], None]]) -> None:
        self._device, self._work = device, work

    def launch(self) -> None:
        self._device.launches += 1
        for one in self._work:
            one()


class HeldDevice(Device):
    """Does everything at once, or records it."""

    name = "a stand-in"
    compute_capability = "8.9"
    stream = 7

    def __init__(self) -> None:
        self._alive: weakref.WeakValueDictionary[int, HeldMemory] = weakref.WeakValueDictionary()
        self._recording: list[Callable[[], None]] | None = None
        self.launches = 0
        self.recordings = 0

    def part(self, address: int, nbytes: int) -> Bytes:
        """The bytes at an address, all in one piece of memory that is still there."""
        for memory in self._alive.values():
            begin = address - memory.address
            if begin >= 0 and begin + nbytes <= memory.nbytes:
                return memory.array[begin : begin + nbytes]
        raise AssertionError("this memory is no longer there, or ends before")

    def allocate(self, nbytes: int) -> HeldMemory:
        memory = HeldMemory(nbytes, 0)
        self._alive[memory.address] = memory
        return memory

    def allocate_host(self, nbytes: int) -> HeldMemory:
        return HeldMemory(nbytes, 0xFF)  # NaN, or a negative number, until it is written

    def upload(self, source: HostMemory, target: Memory) -> None:
        self._copy(source, target)

    def download(self, source: Memory, target: HostMemory) -> None:
        self._copy(source, target)

    def _copy(self, source: Any, target: Any) -> None:
        assert source.nbytes == target.nbytes
        reference = weakref.ref(source), weakref.ref(target)

        def copy() -> None:
            left, right = (one() for one in reference)
            assert left is not None and right is not None, "a copy of memory that is no longer there"
            right.array[:] = left.array

        self.do(copy)

    def copy(self, source: Memory, source_begin: int, target: Memory, target_begin: int, nbytes: int) -> None:
        left = self.part(source.address + source_begin, nbytes)
        right = self.part(target.address + target_begin, nbytes)
        assert not np.shares_memory(left, right)
        self.do(lambda: np.copyto(right, left))

    def clear(self, memory: Memory, begin: int, nbytes: int) -> None:
        self.do(lambda: self.part(memory.address + begin, nbytes).fill(0))

    def do(self, work: Callable[[], None]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def synchronize(self) -> None:
        assert self._recording is None, "nothing can be waited for while work is recorded"

    def record(self, work: Callable[[], None]) -> HeldGraph:
        self.recordings += 1
        self._recording = []
        work()
        recorded, self._recording = self._recording, None
        return HeldGraph(self, recorded)


class HeldEngine(Engine):
    """The bundle's static graph, as an engine of that record."""

    def __init__(
        self, bundle: Bundle, record: EngineRecord, device: HeldDevice, *, records_itself: bool = False
    ) -> None:
        layout = bundle.layout("static")
        self.session = open_session(bundle.path / layout.file, bundle.path)
        self.record = record
        self.device = device
        self.records_itself = records_itself
        self.contexts: list[HeldContext] = []

    def create_context(self) -> HeldContext:
        self.contexts.append(HeldContext(self))
        return self.contexts[-1]


class HeldContext(Context):
    def __init__(self, engine: HeldEngine) -> None:
        self.engine = engine
        self.bindings: list[tuple[int, tuple[int, int]]] = []
        """Profile and `[B, Q]` of every binding."""
        self.runs = 0

    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        record = self.engine.record
        rows, width = shapes["input_ids"]
        assert record.profiles[profile].allows(**{BATCH: rows, SEQUENCE: width})
        assert set(addresses) == {tensor.name for tensor in (*record.inputs, *record.outputs)}
        for present, past in record.aliases.items():
            assert addresses[present] == addresses[past], "the cache is not written in place"
        self.bindings.append((profile, (rows, width)))
        self.sizes = {BATCH: rows, SEQUENCE: width}
        self.addresses = dict(addresses)
        for name, shape in shapes.items():
            assert shape == self._shape(record.tensor(name))

    def _shape(self, tensor: EngineTensor) -> tuple[int, ...]:
        return tuple(self.sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)

    def _view(self, tensor: EngineTensor) -> np.ndarray[Any, Any]:
        shape = self._shape(tensor)
        part = self.engine.device.part(self.addresses[tensor.name], int(np.prod(shape)) * item_bytes(tensor.dtype))
        return part.view(tensor.dtype).reshape(shape)

    def enqueue(self) -> None:
        self.engine.device.do(self._run)

    def _run(self) -> None:
        self.runs += 1
        record = self.engine.record
        wide = {value.name: value.type for value in self.engine.session.get_inputs()}
        feeds = {
            tensor.name: self._view(tensor).astype(np.int64) if "int64" in wide[tensor.name] else self._view(tensor)
            for tensor in record.inputs
        }
        names = [tensor.name for tensor in record.outputs]
        for tensor, value in zip(record.outputs, self.engine.session.run(names, feeds), strict=True):
            self._view(tensor)[:] = value


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
    """A real runner on a stand-in."""
    record, device = record_of(bundle, **changes), HeldDevice()
    signature = bundle.layout("static").signature
    return TrtRunner(
        HeldEngine(bundle, record, device, records_itself=records_itself),
        device,
        make_plan(record, signature),
        signature,
        max_length=bundle.manifest.max_length,
        last=bundle.manifest.last_logits,
        whole_calls=bool(bundle.manifest.whole_calls),
        angles=ChangingAngles.in_bundle(bundle.manifest),
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
