"""Run recorded kernels on a device, compare what comes out, and say how long each takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.bundle.typed_json import ILLEGAL, typed
from doge_deploy.diagnostics import join_findings
from doge_deploy.errors import MismatchError, UnsupportedModelError
from doge_deploy.kernels.interpreter import widen_bfloat16
from doge_deploy.verify.compare import Array, difference
from doge_deploy.verify.kernels.device import DeviceFaultError, KernelDevice
from doge_deploy.verify.kernels.schema import KIND, Expectation, KernelRecording, Launch, Node
from doge_deploy.verify.recording.container import Container, read_container
from doge_deploy.verify.tolerance import AllowedDifference

TIMES = 200
"""Launches that are timed together."""

_INTEGERS = ("int64", "int32", "int8")
_TYPES = ("float32", "float16", "bfloat16", *_INTEGERS)


@dataclass(frozen=True)
class KernelTime:
    """How long a kernel takes, and what it should."""

    plugin: str
    microseconds: float
    memory_bytes: int | None
    """By its cost model: every byte that must cross the memory bus, once."""
    flops: int | None


@dataclass
class NodeResult:
    """What became of a node."""

    name: str
    differences: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Per value the largest error and what was allowed; None where numbers must be equal."""
    failures: list[str] = field(default_factory=list)
    times: list[KernelTime] = field(default_factory=list)


@dataclass
class KernelReport:
    """Everything that was found."""

    file: Path
    device: str
    bandwidth: float
    """Bytes a second, read and written, in a large copy on that device."""
    results: list[NodeResult] = field(default_factory=list)

    def require_passed(self) -> None:
        """Raises MismatchError with the names of the nodes that failed, if there are any."""
        failed = [result.name for result in self.results if result.failures]
        if failed or not self.results:
            raise MismatchError(f"{self.device} does not compute what {self.file} holds: {'; '.join(failed)}")


def open_kernels(path: Path) -> tuple[Container, KernelRecording]:
    """Read a file of `plugins record`.

    Raises:
        UsageError: there is no such file.
        UnsupportedModelError: it is damaged, or another kind of file.
    """
    container = read_container(path, KIND, "a recording of kernels, written by `doge-deploy plugins record`")
    findings: list[str] = []
    recording = typed(KernelRecording, container.document, "", findings)
    if recording is ILLEGAL or findings:
        raise container.damaged(join_findings(findings))
    for node in recording.nodes:
        _check(container, node)
    return container, recording


def _check(container: Container, node: Node) -> None:
    """Names and sizes fit each other: nothing is read beyond what is uploaded, as far as a file can say."""
    if "output" not in node.expected:
        raise container.damaged(f"{node.name!r} does not say what must come out")
    names = {argument for launch in node.launches for argument in launch.arguments if isinstance(argument, str)}
    for name in sorted(names | node.expected.keys()):
        if name not in node.values:
            raise container.damaged(f"{node.name!r} has no value {name!r}")
    for name, value in node.values.items():
        if value.data is not None:
            dtype, array = container.stored(value.data, (value.dtype,), name)
            if dtype != value.dtype or array.shape != value.shape:
                raise container.damaged(f"{name} of {node.name!r} is {list(array.shape)}, not {list(value.shape)}")
    for launch in node.launches:
        for argument in launch.arguments:
            if isinstance(argument, int) and not -(2**31) <= argument < 2**31:
                raise container.damaged(f"{launch.plugin} is passed {argument}, which is no int32")


def verify_kernels(
    path: Path, device: KernelDevice, *, finished: Callable[[NodeResult, float], None] = lambda result, bandwidth: None
) -> KernelReport:
    """Run every node that was recorded for this kind of device.

    Args:
        path: a file of `plugins record`.
        device: where.
        finished: told each result, and the device's bandwidth.

    Raises:
        UsageError, UnsupportedModelError: see `open_kernels`; or nothing was recorded for this kind of device.
        MissingDependencyError: the driver refuses a kernel.
    """
    container, recording = open_kernels(path)
    fitting = [node for node in recording.nodes if node.arch == device.arch]
    if not fitting:
        known = ", ".join(sorted({f"sm_{node.arch}" for node in recording.nodes}))
        raise UnsupportedModelError(
            f"{path} holds kernels for {known}, and {device.name} is sm_{device.arch}: record them for it with "
            f"`doge-deploy plugins record --arch sm_{device.arch}`"
        )
    report = KernelReport(path, device.name, device.bytes_per_second())
    for node in fitting:
        report.results.append(_run(container, node, device))
        finished(report.results[-1], report.bandwidth)
    return report


def _run(container: Container, node: Node, device: KernelDevice) -> NodeResult:
    result = NodeResult(node.name)
    try:
        _run_chain(container, node, device, result)
    except DeviceFaultError as error:
        result.failures.append(f"the device stopped: {error}")
    return result


def _run_chain(container: Container, node: Node, device: KernelDevice, result: NodeResult) -> None:
    hosts: dict[str, Array] = {}
    for name, value in node.values.items():
        data = value.data
        hosts[name] = _fresh(value.dtype, value.shape) if data is None else container.stored(data, _TYPES, name)[1]
    memories = {name: device.upload(array) for name, array in hosts.items()}
    kernels = []
    for launch in node.launches:
        arguments = [memories[one] if isinstance(one, str) else np.int32(one) for one in launch.arguments]
        kernels.append((device.load(launch, _ptx(container, launch)), launch, arguments))
        device.launch(*kernels[-1])
    for name, expected in node.expected.items():
        found = device.download(memories[name], hosts[name])
        wanted = container.stored(expected.data, _TYPES, name)[1]
        _compare(result, name, found, wanted, expected, node.values[name].dtype)
    for kernel, launch, arguments in kernels if not result.failures else ():
        seconds = device.seconds(kernel, launch, arguments, TIMES)
        result.times.append(KernelTime(launch.plugin, seconds * 1e6, launch.memory_bytes, launch.flops))


def _fresh(dtype: str, shape: tuple[int, ...]) -> Array:
    """What memory holds before a kernel writes to it: NaN, or an integer that none of them writes."""
    if dtype in _INTEGERS:
        return np.full(shape, np.iinfo(dtype).min, dtype)
    return np.full(shape, 0x7FC0, np.uint16) if dtype == "bfloat16" else np.full(shape, np.nan, dtype)


def _ptx(container: Container, launch: Launch) -> bytes:
    text = container.read(launch.ptx, ("uint8",), f"the PTX of {launch.plugin}").tobytes()
    if hashlib.sha256(text).hexdigest() != launch.ptx_sha256:
        raise container.damaged(f"the PTX of {launch.plugin} is not the one that it says")
    return text


def _compare(result: NodeResult, name: str, found: Array, wanted: Array, expected: Expectation, dtype: str) -> None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        result.failures.append(f"{name} is {found.dtype}{list(found.shape)}, not {wanted.dtype}{list(wanted.shape)}")
        return
    if expected.max_abs is None or expected.rms is None:
        judged = wanted != expected.ignored if expected.ignored is not None else np.ones(wanted.shape, bool)
        differing = int((judged & (found != wanted)).sum())
        result.differences[name] = (float(differing), None)
        if differing:
            first = [int(index) for index in np.argwhere(judged & (found != wanted))[0]]
            result.failures.append(f"{name}: {differing} of {int(judged.sum())} numbers differ, the first at {first}")
        return
    a, b = (widen_bfloat16(one) if dtype == "bfloat16" else one for one in (found, wanted))
    measured = difference([a], [b])
    result.differences[name] = (measured.max_abs, expected.max_abs)
    if measured.non_finite:
        result.failures.append(f"{name}: {measured.non_finite} NaN or infinite numbers")
    elif not measured.within(AllowedDifference(expected.max_abs, expected.rms)):
        result.failures.append(
            f"{name}: max {measured.max_abs:.3g} (allowed {expected.max_abs:.3g}), rms {measured.rms:.3g} (allowed "
            f"{expected.rms:.3g}), worst at {list(measured.worst_index[1:])}"
        )


def lines(result: NodeResult, bandwidth: float) -> list[str]:
    """A node in words: the verdict, then a line a kernel with its time and the share of the bandwidth it reaches."""
    shown: list[Any] = [
        f"{name} {found:.2g}" + (f" of {allowed:.2g}" if allowed is not None else "")
        for name, (found, allowed) in result.differences.items()
    ]
    text = [f"{'FAIL' if result.failures else 'ok  '} {result.name}: {', '.join(shown)}"]
    text += [f"     {failure}" for failure in result.failures]
    for time in result.times:
        line = f"     {time.plugin}: {time.microseconds:.1f} us"
        if time.memory_bytes is not None and time.flops is not None:
            floor = time.memory_bytes / bandwidth * 1e6
            line += f", {floor / time.microseconds:.0%} of the bandwidth (its {time.memory_bytes / 1e6:.2f} MB take "
            line += f"{floor:.1f} us), {time.flops / time.microseconds / 1e6:.2f} TFLOP/s"
        text.append(line)
    return text
