"""Recorded kernels: run in Triton's interpreter at the recorded launch parameters, judged, and handed to cuda.core."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which exists for Linux only")

from doge_deploy.cli.main import run_command
from doge_deploy.errors import MismatchError, MissingDependencyError, UnsupportedModelError
from doge_deploy.kernels.interpreter import repair_interpreter
from doge_deploy.kernels.registry import installed
from doge_deploy.kernels.samples import Model
from doge_deploy.verify.compare import Array
from doge_deploy.verify.kernels import record as record_module
from doge_deploy.verify.kernels.device import CudaKernels, DeviceFaultError, KernelDevice
from doge_deploy.verify.kernels.judge import KernelReport, lines, open_kernels, verify_kernels
from doge_deploy.verify.kernels.record import record_kernels
from doge_deploy.verify.kernels.samples import AttentionNode, ExpertsNode, samples
from doge_deploy.verify.kernels.schema import KIND, Launch
from doge_deploy.verify.recording.container import Tensors, read_container, write_container

SIZES = Model(2, 1, 1, 16, 16, 32, 16, 3)
ARCH = 90


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step with a window, and one of a mixture."""
    patch = pytest.MonkeyPatch()
    chosen = [AttentionNode(SIZES, 16, 1, False, "float16"), ExpertsNode(SIZES, 2, "reference", False, "float16")]
    patch.setattr(record_module, "samples", lambda model, dtype: chosen)
    file = tmp_path_factory.mktemp("kernels") / "k"
    record_kernels(file, SIZES, dtype="float16", archs=[ARCH])
    patch.undo()
    return file


class Interpreted(KernelDevice):
    """Triton's interpreter, given what a device is given."""

    name = "Triton's interpreter"
    arch = ARCH

    def __init__(self, damage: Callable[[Launch, Sequence[Any]], None] = lambda launch, arguments: None) -> None:
        self._damage = damage
        repair_interpreter()

    def upload(self, array: Array) -> Any:
        return torch.from_numpy(array.copy())

    def download(self, memory: Any, like: Array) -> Array:
        result: Array = memory.numpy()
        return result

    def load(self, launch: Launch, ptx: bytes) -> Any:
        assert f".entry {launch.entry}(" in ptx.decode()
        spec = installed().spec(launch.plugin)
        assert spec is not None
        return spec.load_kernel()

    def launch(self, kernel: Any, launch: Launch, arguments: Sequence[Any]) -> None:
        numbers = [int(one) if isinstance(one, np.int32) else one for one in arguments]
        kernel[tuple(launch.grid)](*numbers, **launch.constants)
        self._damage(launch, arguments)

    def seconds(self, kernel: Any, launch: Launch, arguments: Sequence[Any], times: int) -> float:
        return 2e-6

    def bytes_per_second(self) -> float:
        return 1e12


def test_what_was_recorded_passes_at_the_recorded_launch_parameters(recorded: Path) -> None:
    report = verify_kernels(recorded, Interpreted())
    report.require_passed()
    assert len(report.results) == 2
    attention, experts = report.results
    assert {"output", "kept", "kept_count", "last_kept"} <= attention.differences.keys()
    assert {"output", "expert_ids"} <= experts.differences.keys()
    assert [time.plugin for time in experts.times] == ["doge::CDMoERoute", "doge::CDMoEExperts"]
    assert "% of the bandwidth" in "\n".join(lines(experts, report.bandwidth))


DAMAGE: dict[str, tuple[str, Callable[[torch.Tensor], None], str]] = {
    "one-number-of-the-output": ("doge::DynamicMaskAttendSelected", lambda t: t.view(-1)[3].add_(0.5), "output: max"),
    "nothing-written": ("doge::CDMoEExperts", lambda t: t.fill_(float("nan")), "NaN or infinite"),
    "another-expert": ("doge::CDMoERoute", lambda t: t.view(-1)[0].add_(1), "expert_ids: 1 of 6 numbers differ"),
}


@pytest.mark.parametrize(("plugin", "edit", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_wrong_kernel_is_found(plugin: str, edit: Callable[[torch.Tensor], None], words: str, recorded: Path) -> None:
    def damage(launch: Launch, arguments: Sequence[Any]) -> None:
        if launch.plugin == plugin:
            # of experts the weights come last; a wrong list of keys would be read as addresses
            edit(arguments[-2 if plugin == "doge::CDMoERoute" else -1])

    report = verify_kernels(recorded, Interpreted(damage))
    failures = [failure for result in report.results for failure in result.failures]
    assert any(words in failure for failure in failures), failures
    with pytest.raises(MismatchError, match="does not compute what"):
        report.require_passed()


def test_a_device_that_stops_is_a_failure(recorded: Path) -> None:
    def stop(launch: Launch, arguments: Sequence[Any]) -> None:
        raise DeviceFaultError("CUDA_ERROR_ILLEGAL_ADDRESS")

    report = verify_kernels(recorded, Interpreted(stop))
    assert [result.failures for result in report.results] == [["the device stopped: CUDA_ERROR_ILLEGAL_ADDRESS"]] * 2


def test_nothing_run_is_not_a_pass() -> None:
    with pytest.raises(MismatchError):
        KernelReport(Path("k"), "a device", 1.0).require_passed()


def test_a_kernel_that_disagrees_with_its_twin_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = ExpertsNode(SIZES, 1, "reference", False, "float32")
    original = ExpertsNode.twin
    monkeypatch.setattr(ExpertsNode, "twin", lambda self, inputs, dtype: original(self, inputs, dtype) * 1.01)
    monkeypatch.setattr(record_module, "samples", lambda model, dtype: [node])
    monkeypatch.setattr(record_module, "compile_all", lambda jobs: pytest.skip("not reached"))
    with pytest.raises(MismatchError, match="nothing was recorded"):
        record_module._output(node, original(node, node.inputs(0), "float32"), node.inputs(0), Tensors())


def test_every_kernel_is_in_some_node() -> None:
    model = Model(2, 1, 1, 128, 2048, 256, 1024, 16)
    used = set()
    for sample in samples(model, "float16"):
        operator = installed().operator("doge", sample.operator)
        assert operator is not None
        used |= {step.spec.name for step in operator.chain(sample.attributes, frozenset(sample.inputs(0)))}
    assert used == {spec.name for spec in installed().specs()}


def test_another_device_is_told_what_to_record(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interpreted, "arch", 86)
    with pytest.raises(UnsupportedModelError, match=r"holds kernels for sm_90, and .* is sm_86: .*--arch sm_86"):
        verify_kernels(recorded, Interpreted())


def _edited(recorded: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    container, tensors = read_container(recorded, KIND, "a recording"), Tensors()
    for digest, info in container.infos.items():
        dtype = {"I8": "int8", "I32": "int32", "I64": "int64", "U8": "uint8"}.get(info.dtype, info.dtype)
        assert tensors.add(container.read(digest, (dtype,), "a tensor"), dtype) == digest
    document = json.loads(json.dumps(container.document))
    edit(document)
    write_container(target, KIND, document, tensors)
    return target


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown-value": (lambda d: d["nodes"][0]["launches"][0].update(arguments=["nothing"]), "has no value 'nothing'"),
    "shape": (lambda d: d["nodes"][0]["values"]["query"].update(shape=[1, 2, 1, 17]), "not [1, 2, 1, 17]"),
    "grid": (lambda d: d["nodes"][0]["launches"][0].update(grid=[1, 0, 1]), "must be"),
    "threads": (lambda d: d["nodes"][0]["launches"][0].update(threads=4096), "must be 1 to 1024"),
    "int64": (lambda d: d["nodes"][0]["launches"][0].update(arguments=[2**40]), "which is no int32"),
    "no-output": (lambda d: d["nodes"][0]["expected"].pop("output"), "does not say what must come out"),
}


@pytest.mark.parametrize(("edit", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_damaged_file_is_one_line(
    edit: Any, words: str, recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["plugins", "verify", str(_edited(recorded, tmp_path / "k", edit))]) == 3
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1


def test_up_to_the_driver(recorded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert run_command(["plugins", "verify", str(recorded)]) == 4
    error = capfd.readouterr().err
    assert "no CUDA device" in error and error.count("\n") == 1


# --- what cuda.core is told


class Buffer:
    """Memory that knows where it was copied to."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.zeros(nbytes, np.uint8)

    def copy_to(self, other: Buffer, *, stream: Any) -> None:
        other.array[:] = self.array[: len(other.array)]

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Told:
    """What was asked of a `cuda.core` and a driver that do nothing."""

    def __init__(self, refusal: int = 0) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.attributes: list[tuple[Any, ...]] = []
        self.loaded: list[tuple[bytes, str]] = []
        kernel = SimpleNamespace(handle="the kernel's handle")
        event = SimpleNamespace(sync=lambda: None)
        stream = SimpleNamespace(sync=lambda: None, record=lambda options: event)
        device = SimpleNamespace(
            name="a device",
            device_id=0,
            compute_capability=(9, 0),
            set_current=lambda: None,
            create_stream=lambda: stream,
            allocate=lambda nbytes, stream: Buffer(nbytes),
        )

        def from_ptx(text: bytes, *, name: str) -> Any:
            self.loaded.append((text, name))
            return SimpleNamespace(get_kernel=lambda entry: kernel)

        def set_attribute(*arguments: Any) -> tuple[int]:
            self.attributes.append(arguments)
            return (refusal,)

        self.core = SimpleNamespace(
            Device=lambda index: device,
            LegacyPinnedMemoryResource=lambda: SimpleNamespace(allocate=Buffer),
            ObjectCode=SimpleNamespace(from_ptx=from_ptx),
            LaunchConfig=lambda **options: options,
            launch=lambda *arguments: self.launches.append(arguments),
        )
        self.driver = SimpleNamespace(
            CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic shared"),
            cuKernelSetAttribute=set_attribute,
        )


def test_arguments_stand_in_the_order_of_the_ptx(recorded: Path) -> None:
    told = Told()
    device = CudaKernels(told.core, told.driver)
    assert device.arch == 90
    _, recording = open_kernels(recorded)
    container = read_container(recorded, KIND, "a recording")
    for launch in recording.nodes[0].launches:
        ptx = container.read(launch.ptx, ("uint8",), "PTX").tobytes()
        kernel = device.load(launch, ptx)
        memories = {name: device.upload(np.zeros(4)) for name in launch.arguments if isinstance(name, str)}
        arguments = [memories[one] if isinstance(one, str) else np.int32(one) for one in launch.arguments]
        device.launch(kernel, launch, arguments)
        _, config, found, *passed = told.launches[-1]
        assert found is kernel
        assert config == {
            "grid": tuple(launch.grid),
            "block": (launch.threads, 1, 1),
            "shmem_size": launch.shared_memory_bytes,
        }
        # the text itself says what it takes: 64 bits for a pointer, 32 for a number
        head = ptx.decode().split(f".entry {launch.entry}(")[1].split(")")[0]
        widths = [64 if ".b64" in line or ".u64" in line else 32 for line in head.splitlines() if ".param" in line]
        assert widths == [64 if isinstance(one, Buffer) else 32 for one in passed]
        assert all(isinstance(one, (Buffer, np.int32)) for one in passed)
        assert f".maxntid {launch.threads}" in ptx.decode() or f".reqntid {launch.threads}" in ptx.decode()
    assert [name for _, name in told.loaded] == [launch.plugin for launch in recording.nodes[0].launches]


def test_numbers_go_there_and_come_back(recorded: Path) -> None:
    device = CudaKernels(Told().core, Told().driver)
    for array in (np.arange(6, dtype=np.float16).reshape(2, 3), np.array([], np.int32), np.array(7)):
        np.testing.assert_array_equal(device.download(device.upload(array), np.zeros_like(array)), array)


def test_more_shared_memory_is_asked_for(recorded: Path) -> None:
    _, recording = open_kernels(recorded)
    launch = recording.nodes[0].launches[0]
    from dataclasses import replace

    told = Told()
    CudaKernels(told.core, told.driver).load(replace(launch, shared_memory_bytes=48 * 1024), b"")
    assert not told.attributes
    CudaKernels(told.core, told.driver).load(replace(launch, shared_memory_bytes=99_000), b"")
    assert told.attributes == [("dynamic shared", 99_000, "the kernel's handle", 0)]
    refusing = Told(refusal=1)
    with pytest.raises(MissingDependencyError, match=r"does not load doge::.*99000 bytes of shared memory"):
        CudaKernels(refusing.core, refusing.driver).load(replace(launch, shared_memory_bytes=99_000), b"")


def test_cuda_core_takes_such_arguments() -> None:
    """The layout that the driver gets, from cuda.core's own code, which needs no driver for it."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler")
    import ctypes

    holder = handler.ParamHolder((np.int32(7), np.int32(-2)))
    addresses = (ctypes.c_void_p * 2).from_address(holder.ptr)
    assert [ctypes.c_int32.from_address(address or 0).value for address in addresses] == [7, -2]
