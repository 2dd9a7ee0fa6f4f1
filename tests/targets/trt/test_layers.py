"""The builder's own list of kernels, and its progress."""

from __future__ import annotations

from doge_deploy.targets.trt.layers import BuilderLog, count_kernels, parse_kernel
from doge_deploy.targets.trt.phases import Phases

TENSOR = (
    "{{ Name: {name}, Dimensions: [1,2,-1], Strides: [-1,1,1], StrideOrder: [2,1,0], Datatype: {dtype}, "
    "Format: (Linear) Row major linear format }}"
)


def line(name: str, kind: str, outputs: str = "", nodes: str = "") -> str:
    given = TENSOR.format(name="x, y", dtype="Int64")
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {given}], Constants: [], Outputs: [ {outputs}], "
        f"TacticName: {name}_0x12, StreamId: 0, Metadata: {metadata}"
    )


MHA = line("_gemm_mha_v2_myl0_24", "kgen", TENSOR.format(name="out", dtype="Half"), "Attention_0 Reshape_1")
WAIT = "Name: a^wait_3, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "


def test_a_kernel_is_read() -> None:
    kernel = parse_kernel(MHA)
    assert kernel is not None
    assert (kernel.name, kernel.type) == ("_gemm_mha_v2_myl0_24", "kgen")
    assert kernel.inputs == [{"name": "x, y", "shape": "1,2,-1", "dtype": "Int64"}]
    assert kernel.outputs == [{"name": "out", "shape": "1,2,-1", "dtype": "Half"}]
    assert kernel.onnx_layers == ["Attention_0", "Reshape_1"]
    assert kernel.tactic == "_gemm_mha_v2_myl0_24_0x12"


def test_what_is_no_kernel_is_left_out() -> None:
    assert parse_kernel("Layers:") is None
    assert parse_kernel("Bindings:") is None


def test_kernels_in_numbers() -> None:
    log = BuilderLog()
    log.read("\n".join(["Layers:", MHA, WAIT, "", "Bindings:"]), is_error=False)
    counts = count_kernels(log.kernels)
    assert counts is not None
    assert (counts.total, counts.fused_attention) == (2, 1)
    assert counts.by_type == {"kgen": 1, "wait": 1}
    assert counts.by_precision == {"Half": 1}


def test_a_silent_builder_has_no_counts() -> None:
    assert count_kernels([]) is None


def test_memory_and_errors_are_noted_and_forgotten() -> None:
    log = BuilderLog()
    for message in ("Total Activation Memory: 100", "Total Activation Memory: 60", "Total Weights Memory: 7"):
        log.read(message, is_error=False)
    log.read("no", is_error=True)
    assert (log.activation_bytes, log.weight_bytes, log.errors) == (100, 7, ["no"])
    log.forget()
    assert log == BuilderLog()


def test_progress_of_nested_phases_never_falls() -> None:
    phases, told = Phases(), []
    phases.start("root", None, 2)
    phases.start("child", "root", 4)
    for step in range(4):
        phases.step("child", step)
        told.append(phases.fraction())
    phases.finish("child")
    told.append(phases.fraction())
    phases.step("root", 0)
    phases.start("other", "root", 1)
    told.append(phases.fraction())
    phases.step("unknown", 3)
    phases.finish("root")
    told.append(phases.fraction())
    assert told == sorted(told)
    assert told[:4] == [0.125, 0.25, 0.375, 0.5]
    assert told[-1] == 1.0
