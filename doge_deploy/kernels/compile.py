"""Compile kernels ahead of time: PTX with a record each, cached by content.

The same kernel text, constants, device and Triton give the same bytes; nothing of this machine is in them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import queue
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from doge_deploy.errors import DogeDeployError, MissingDependencyError, UnsupportedModelError
from doge_deploy.kernels.devices import DEVICES
from doge_deploy.kernels.spec import Binding, TensorSpec
from doge_deploy.process.child import Child, ChildError, worker_command

POINTERS: Mapping[str, str] = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "int64": "*i64",
    "int32": "*i32",
    "int8": "*i8",
    "bool": "*i1",
}
"""Triton's names of pointer types."""


class CompileError(DogeDeployError):
    """A kernel cannot be compiled for a device."""

    exit_code = 3


@dataclass(frozen=True)
class Record:
    """What is known of one compiled kernel; it lies beside the PTX as JSON."""

    plugin: str
    """`doge::DynamicMaskSelect`."""
    plugin_version: str
    kernel: str
    """`module:function`."""
    entry: str
    """Name of the entry in the PTX."""
    arch: int
    """Compute capability: 87."""
    dtype: str
    """Of T."""
    signature: tuple[tuple[str, str], ...]
    """(name, type) of every argument in order: inputs, scalars, outputs."""
    constants: Mapping[str, Any]
    """Compile-time constants, block sizes among them."""
    grid: tuple[str, str, str]
    """Expressions of dimensions, attributes and constants."""
    threads: int
    """Per program: the launch's block size along x."""
    num_stages: int
    shared_memory_bytes: int
    registers: int
    """Per thread, by ptxas."""
    spill_store_bytes: int
    spill_load_bytes: int
    ptx_version: int
    ptx_sha256: str
    triton_version: str
    source_sha256: str
    """Of the file that holds the kernel."""

    @property
    def spill_bytes(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes


@dataclass(frozen=True)
class Compiled:
    """PTX and its record."""

    ptx: str
    record: Record


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/doge-deploy/plugins`, or the same under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "doge-deploy" / "plugins"


def compile_all(
    jobs: Sequence[tuple[Binding, int]], *, cache: Path | None = None, processes: int = 1
) -> Iterator[Compiled]:
    """Compile each (binding, compute capability), in order.

    Args:
        jobs: what to compile for which device.
        cache: directory of earlier results; None for `default_cache()`.
        processes: compilers that run at once.

    Raises:
        MissingDependencyError: Triton is not installed.
        UnsupportedModelError: the device has no arithmetic in the kernel's dtype.
        CompileError: the compiler refuses a kernel, or it needs more shared memory than the device has.
    """
    cache = default_cache() if cache is None else cache
    for binding, arch in jobs:
        _check(binding, arch)
    requests = [_request(binding, arch) for binding, arch in jobs]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(processes) as pool:
        workers = _Workers(Path(scratch))
        try:
            yield from pool.map(lambda request: _compile(request, cache, workers), requests)
        finally:
            workers.close()


def compile_one(binding: Binding, arch: int, *, cache: Path | None = None) -> Compiled:
    """Compile one kernel for one device; see `compile_all`."""
    return next(iter(compile_all([(binding, arch)], cache=cache)))


def is_supported(binding: Binding, arch: int) -> bool:
    """Whether the device has arithmetic in the binding's dtype."""
    return binding.dtype != "bfloat16" or DEVICES[arch].bfloat16


def _check(binding: Binding, arch: int) -> None:
    if not is_supported(binding, arch):
        raise UnsupportedModelError(f"{binding.spec.id}: sm_{arch} has no bfloat16; use float16 or float32 there")


def triton_version() -> str:
    """Raises: MissingDependencyError: Triton is not installed."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise MissingDependencyError("triton is not installed: pip install 'doge-deploy[plugins]'") from None


def _request(binding: Binding, arch: int) -> dict[str, Any]:
    """Everything that decides the bytes of the PTX, and what the record says besides."""
    spec, tile = binding.spec, binding.tile(arch)
    module = spec.kernel.partition(":")[0]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise MissingDependencyError(f"{spec.id}: its kernel {spec.kernel} is not installed")

    def pointers(tensors: Iterable[TensorSpec]) -> list[tuple[str, str]]:
        return [(tensor.name, POINTERS[binding.dtype_of(tensor)]) for tensor in tensors]

    arguments = [*pointers(spec.inputs), *((name, "i32") for name in spec.scalars), *pointers(spec.outputs)]
    return {
        "plugin": spec.id,
        "plugin_version": spec.version,
        "kernel": spec.kernel,
        "arch": arch,
        "dtype": binding.dtype,
        "arguments": arguments,
        "signature": [type_ for _, type_ in arguments],
        "constants": binding.constants(tile),
        "grid": [str(size) for size in spec.grid],
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "max_registers": tile.max_registers,
        "ptx_version": DEVICES[arch].ptx_version,
        "triton_version": triton_version(),
        "source_sha256": hashlib.sha256(Path(found.origin).read_bytes()).hexdigest(),
    }


def _compile(request: dict[str, Any], cache: Path, workers: _Workers) -> Compiled:
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    entry = cache / key[:2] / key
    cached = _read(entry)
    if cached is not None:
        return cached
    what = f"{request['plugin']} for sm_{request['arch']} in {request['dtype']}"
    answer = workers.compile(request, what)
    if "refusal" in answer:
        raise CompileError(f"{what}: {answer['refusal']}")
    limit = DEVICES[request["arch"]].shared_memory_bytes
    if answer["shared_memory_bytes"] > limit:
        raise CompileError(
            f"{what}: needs {answer['shared_memory_bytes']} bytes of shared memory, the device has {limit}"
        )
    if answer["scratch_bytes"]:
        raise CompileError(f"{what}: needs {answer['scratch_bytes']} bytes of scratch memory, which no engine gives it")
    record = Record(
        plugin=request["plugin"],
        plugin_version=request["plugin_version"],
        kernel=request["kernel"],
        entry=answer["entry"],
        arch=request["arch"],
        dtype=request["dtype"],
        signature=tuple(tuple(argument) for argument in request["arguments"]),
        constants=request["constants"],
        grid=tuple(request["grid"]),
        threads=answer["threads"],
        num_stages=request["num_stages"],
        shared_memory_bytes=answer["shared_memory_bytes"],
        registers=answer["registers"],
        spill_store_bytes=answer["spill_store_bytes"],
        spill_load_bytes=answer["spill_load_bytes"],
        ptx_version=request["ptx_version"],
        ptx_sha256=hashlib.sha256(answer["ptx"].encode()).hexdigest(),
        triton_version=request["triton_version"],
        source_sha256=request["source_sha256"],
    )
    compiled = Compiled(answer["ptx"], record)
    write(compiled, entry)
    return compiled


def write(compiled: Compiled, directory: Path) -> None:
    """Write `kernel.ptx` and `record.json` into `directory`, aside first: they are there whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as aside:
        made = Path(aside) / "made"
        made.mkdir()
        (made / "kernel.ptx").write_text(compiled.ptx, encoding="utf-8")
        text = json.dumps(asdict(compiled.record), indent=2, sort_keys=True)
        (made / "record.json").write_text(text + "\n", encoding="utf-8")
        if _read(directory) is None:
            _remove(directory)
            made.rename(directory)


def _remove(directory: Path) -> None:
    """A damaged entry of the cache."""
    for name in ("kernel.ptx", "record.json"):
        (directory / name).unlink(missing_ok=True)
    if directory.exists():
        directory.rmdir()


def _read(directory: Path) -> Compiled | None:
    """A result that was written earlier; None where there is none, or where its bytes are not those of its record."""
    try:
        ptx = (directory / "kernel.ptx").read_text(encoding="utf-8")
        stored = json.loads((directory / "record.json").read_text(encoding="utf-8"))
        stored["signature"] = tuple(tuple(argument) for argument in stored["signature"])
        stored["grid"] = tuple(stored["grid"])
        record = Record(**{field.name: stored[field.name] for field in fields(Record)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if hashlib.sha256(ptx.encode()).hexdigest() != record.ptx_sha256:
        return None
    return Compiled(ptx, record)


class _Workers:
    """Compiler processes, as many as threads ask at once; each answers one request at a time."""

    def __init__(self, scratch: Path) -> None:
        self._free: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self._started = ExitStack()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        # line tables would put paths of this machine into the PTX
        environment |= {"TRITON_CACHE_DIR": str(scratch), "TRITON_DISABLE_LINE_INFO": "1"}
        self._environment = environment

    def compile(self, request: dict[str, Any], what: str) -> dict[str, Any]:
        """Raises: CompileError: the process died."""
        try:
            worker = self._free.get_nowait()
        except queue.Empty:
            worker = self._start()
        try:
            answer = worker.ask(request)
        except ChildError as error:
            raise CompileError(f"{what}: the compiler process {error}") from None
        self._free.put(worker)
        return answer

    def _start(self) -> Child:
        worker = Child(worker_command("doge_deploy.kernels.compile_worker"), environment=self._environment)
        self._started.callback(worker.__exit__, None, None, None)
        self._started.callback(worker.kill)
        return worker

    def close(self) -> None:
        """End all processes, whatever they are at."""
        self._started.close()
