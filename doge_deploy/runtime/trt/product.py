"""The vendor's libraries at run time: which engine, whether it belongs here, and its contexts.

TensorRT and TensorRT-RTX have the same names for the same things; where one has more, this says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from doge_deploy.bundle.engine_record import EngineRecord
from doge_deploy.bundle.manifest import Manifest
from doge_deploy.bundle.opening import Bundle
from doge_deploy.bundle.signature import Signature
from doge_deploy.devices.host import platform_name
from doge_deploy.errors import BrokenBundleError, MissingDependencyError, UnsupportedModelError, UsageError
from doge_deploy.options.build import Target
from doge_deploy.runtime.rows import ChangingAngles
from doge_deploy.runtime.trt.bounded import BoundedTrtRunner
from doge_deploy.runtime.trt.device import Device, open_device
from doge_deploy.runtime.trt.plan import BindingPlan, make_plan, make_prefill_plan
from doge_deploy.runtime.trt.runner import Context, Engine, TrtRunner
from doge_deploy.targets.trt.vendor import PRODUCTS, import_product


def open_runner(bundle: Bundle, backend: Target, engine: str | None = None) -> TrtRunner:
    """A runner of an engine of a bundle.

    Args:
        bundle: an opened bundle.
        backend: `trt` or `trt-rtx`.
        engine: the engine's name; where None, the one of that backend that fits this GPU.

    Raises:
        UsageError: the bundle has no such engine, or several fit.
        MissingDependencyError: the library, the driver or the GPU that the engine was built for is not here.
        BrokenBundleError: the engine does not belong to the bundle's graph.
        UnsupportedModelError: the library refuses the engine.
    """
    candidates = engines_for(bundle, backend, engine)
    device = open_device(PRODUCTS[backend].extra)
    trt = import_product(backend)
    name = choose_engine(bundle.path, candidates, device.compute_capability, str(trt.__version__))
    record = candidates[name]
    manifest = bundle.manifest
    signature = bundle.layout(record.layout).signature
    plan, prefill_plan = make_plan(record, signature), make_prefill_plan(record, signature)
    loaded = _LoadedEngine(trt, bundle.path / record.engine_file, device)
    loaded.check_aliases(record)
    prefill = None
    if prefill_plan is not None and record.prefill is not None:
        prefill = _LoadedEngine(trt, bundle.path / record.prefill.engine_file, device), prefill_plan
    return make_runner(manifest, signature, record.window, loaded, device, plan, prefill)


def make_runner(
    manifest: Manifest,
    signature: Signature,
    window: int | None,
    engine: Engine,
    device: Device,
    plan: BindingPlan,
    prefill: tuple[Engine, BindingPlan] | None,
) -> TrtRunner:
    """The runner of the kind that an engine needs.

    Args:
        manifest: of the bundle.
        signature: of its layout.
        window: slots of the cache where it holds the window; None where it has one for each token.
        engine, plan: of its network that decodes, or of its only one.
        device: where they are loaded.
        prefill: the other network, where there is one.
    """
    common: dict[str, Any] = {
        "max_length": manifest.max_length,
        "last": manifest.last_logits,
        "whole_calls": bool(manifest.whole_calls),
        "angles": ChangingAngles.in_bundle(manifest),
    }
    if window is None:
        return TrtRunner(engine, device, plan, signature, **common)
    return BoundedTrtRunner(engine, device, plan, signature, window=window, prefill=prefill, **common)


def engines_for(bundle: Bundle, backend: Target, name: str | None = None) -> dict[str, EngineRecord]:
    """The engines of that backend, or the one called `name`.

    Raises:
        UsageError: there is none.
    """
    held = bundle.manifest.engines
    build = f"make one with `doge-deploy build {bundle.path} --target {backend}`"
    if name is not None:
        record = bundle.engine(name)
        if record.target != backend:
            raise UsageError(f"engine {name} of {bundle.path} is for --backend {record.target}, not {backend}")
        return {name: record}
    found = {one: record for one, record in held.items() if record.target == backend}
    if not found:
        others = f"; it holds {', '.join(held)}" if held else ""
        raise UsageError(f"{bundle.path} has no {backend} engine{others}; {build}")
    return found


def choose_engine(path: Path, candidates: Mapping[str, EngineRecord], capability: str, version: str) -> str:
    """The candidate that runs on a GPU of that compute capability, with that version of its product.

    Raises:
        MissingDependencyError: none does; says why of each.
        UsageError: several do.
    """
    obstacles = {name: obstacle(record, capability, version) for name, record in candidates.items()}
    fitting = [name for name, reason in obstacles.items() if reason is None]
    if not fitting:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items())
        raise MissingDependencyError(f"no engine of {path} runs here: {reasons}")
    if len(fitting) > 1:
        raise UsageError(f"{path} has several engines for this GPU, name one with --engine: {', '.join(fitting)}")
    return fitting[0]


def obstacle(record: EngineRecord, capability: str, version: str) -> str | None:
    """Why an engine cannot run here, and the remedy; None: nothing known speaks against it."""
    if record.platform != platform_name():
        return f"was built on {record.platform}, this is {platform_name()}; build it here"
    if record.version != version:
        return (
            f"was built with {record.product} {record.version}, this is {version}; build it again, or install that one"
        )
    if record.compute_capabilities and capability not in record.compute_capabilities:
        built = ", ".join(record.compute_capabilities)
        return f"was built for compute capability {built}, this GPU has {capability}; build it for that"
    if record.strip_weights:
        return "has no weights (--strip-weights), and they are not put in here yet; build it without"
    return None


class _LoadedEngine(Engine):
    """An engine of either product."""

    def __init__(self, trt: ModuleType, file: Path, device: Device) -> None:
        self._trt, self._device = trt, device
        self._log = _make_log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise UnsupportedModelError(f"{trt.__name__} {trt.__version__} refuses {file}: {self._log.last()}")
        # TensorRT-RTX compiles kernels for the shapes that it meets, and knows when a graph may be recorded.
        self.records_itself = hasattr(trt, "CudaGraphStrategy")
        size = int(self._engine.device_memory_size_v2)
        self._scratch = device.allocate(size) if size else None

    def check_aliases(self, record: EngineRecord) -> None:
        """Hold what the record says about caches against the engine itself.

        Raises:
            BrokenBundleError: the engine does not write the same caches in place.
        """
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return
        wrong = [
            present
            for present, past in record.aliases.items()
            if self._engine.get_aliased_input_tensor(present) != past
        ]
        if wrong:
            raise BrokenBundleError(f"{record.engine_file}: {', '.join(wrong)} are not written where the manifest says")

    def create_context(self) -> Context:
        allocation = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.records_itself:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(allocation)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(allocation)
        if context is None:
            raise UnsupportedModelError(f"{self._trt.__name__} makes no execution context: {self._log.last()}")
        if self._scratch is not None:
            context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        return _VendorContext(self._trt, context, self._device, self._log)


class _VendorContext(Context):
    def __init__(self, trt: ModuleType, context: Any, device: Device, log: Any) -> None:
        self._trt, self._context, self._device, self._log = trt, context, device, log

    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        if self._context.active_optimization_profile != profile:
            self._check(
                self._context.set_optimization_profile_async(profile, self._device.stream), f"profile {profile}"
            )
            self._device.synchronize()
        for name, shape in shapes.items():
            self._check(self._context.set_input_shape(name, shape), f"{name} {list(shape)}")
        for name, address in addresses.items():
            self._check(self._context.set_tensor_address(name, address), f"the address of {name}")

    def enqueue(self) -> None:
        self._check(self._context.execute_async_v3(self._device.stream), "a run")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise UnsupportedModelError(f"{self._trt.__name__} refuses {what}: {self._log.last()}")


def _make_log(trt: ModuleType) -> Any:
    """A logger of the product that keeps what went wrong, and writes nothing."""

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split())[:500])

        def last(self) -> str:
            return self.errors[-1] if self.errors else "it does not say why"

    return Log()
