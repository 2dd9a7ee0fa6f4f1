"""Where ONNX Runtime puts the nodes of whole lowered graphs, against what the table says; and the runner on `cuda`.

    LD_LIBRARY_PATH=/tmp/standin python tests/cuda_placement.py BUNDLE...

It needs onnxruntime-gpu, and runs with NVIDIA's libraries or with tests/cuda_standin.py. With the latter kernels do
nothing, so no number is looked at but those that copies alone make.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
from cuda_kernels import placement

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime import cuda
from doge_deploy.runtime.cuda.runner import CudaRunner
from doge_deploy.targets.cuda.lowering import lower


def check_nodes(path: Path) -> str:
    """The provider gets every node but arithmetic of shapes, as the table says."""
    lowering = lower(ir.load(path / "model.onnx"))
    placed = placement(ir.to_proto(lowering.model).SerializeToString(), folder=str(path))
    on_cpu = Counter(op for op, _ in placed.get("CPUExecutionProvider", ()))
    shapes = Counter(lowering.placement.shapes)
    wrong = on_cpu - shapes
    if wrong or lowering.placement.cpu:
        sys.exit(f"{path}: on the CPU, beside arithmetic of shapes: {dict(wrong)} {lowering.placement.cpu}")
    found, expected = len(placed["CUDAExecutionProvider"]), sum(lowering.placement.device.values())
    if found + sum(on_cpu.values()) != expected + sum(shapes.values()):
        sys.exit(f"{path}: {found} nodes on the device, the table says {expected}")
    return f"{found} nodes on the device, {sum(on_cpu.values())} of arithmetic of shapes"


def check_runner(path: Path) -> str:
    """Its calls are accepted, and rows move as they should; the caches are filled by hand."""
    bundle = open_bundle(path)
    runner = cuda.open_runner(bundle, bundle.layout())
    assert isinstance(runner, CudaRunner)
    runner.reset(3)
    for first, rows, width in ((0, 3, 7), (0, 3, 1), (1, 2, 1), (2, 1, 5), (0, 3, 1)):
        runner.run_rows(first, np.full((rows, width), 5), np.full(rows, width)).argmax()
    rng, filled = np.random.default_rng(0), {}
    for name, cache in runner.caches.items():
        filled[name] = rng.normal(size=cache.shape).astype(cache.dtype)
        cache.write(filled[name])
    runner._written[:] = next(iter(runner.caches.values())).shape[2]
    runner.swap_rows(0, 2)
    runner.truncate_row(1, 4)
    runner.clear_row(2)
    runner.copy_row(0, 2, 3)
    for name, cache in runner.caches.items():
        right = filled[name][[2, 1, 0]]
        right[1, :, 4:] = 0
        right[2] = 0
        right[2, :, :3] = right[0, :, :3]
        if not np.array_equal(cache.read(), right):
            sys.exit(f"{path}: {name} is not what was moved there")
    return "its runner moves rows"


if __name__ == "__main__":
    for bundle in map(Path, sys.argv[1:]):
        print(f"{bundle.name}: {check_nodes(bundle)}; {check_runner(bundle)}", flush=True)
