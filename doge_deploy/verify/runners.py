"""The graph under test, as a backend runs it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.devices.packages import require_graph_packages
from doge_deploy.errors import MissingDependencyError
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.runtime.base import BundleRunner
from doge_deploy.targets.backend import Backend, SessionOptions, find
from doge_deploy.verify.cases import Case

if TYPE_CHECKING:
    import onnx_ir as ir

LOWERED_LAYOUT = "static"
"""The layout that engines are built from."""


@dataclass(frozen=True)
class Runners:
    """The graph under test."""

    plain: BundleRunner
    exposed: BundleRunner | None
    """With its selections as further outputs, maybe the same; None where the graph selects nothing, or does not show
    what."""
    hides_selections: bool = False
    """Whatever it selects, nobody sees it: an engine has the outputs that it was built with."""
    backend: Backend[Any] | None = None
    """What opened them; None for a runner of no backend."""

    def obstacle(self, case: Case) -> str | None:
        """Why a case cannot be run; None: it can."""
        calls = [call.input_ids.shape for call in case.calls]
        refused = next(filter(None, (self.plain.refusal(*shape) for shape in calls)), None)
        return refused if refused or self.backend is None else self.backend.obstacle(self.plain, calls)


def describe_lowered(bundle: Bundle, layout: str) -> str:
    """What is judged where a lowering is: its hash, and the engines that were built from the same graphs."""
    from doge_deploy.targets.trt.parts import lowered_parts

    digests = [hashlib.sha256(data).hexdigest() for data in lowered_parts(bundle, bundle.layout(layout))]
    built = [
        name
        for name, record in bundle.manifest.engines.items()
        if [network.lowered_onnx_sha256 for network in record.networks] == digests
    ]
    of = f", that of {', '.join(built)}" if built else ""
    hashes = " and ".join(f"{digest[:12]}..." for digest in digests)
    how = "lowered for TensorRT" if len(digests) == 1 else "lowered for TensorRT to a decode and a prefill graph"
    return f"{bundle.layout(layout).file} {how} (sha256 {hashes}{of})"


def lowered_graph(bundle: Bundle, layout: str) -> bytes:
    """The layout's graph as TensorRT gets it."""
    return _lowered(_load(bundle.path / bundle.layout(layout).file), round_inputs=True)


def _lowered(model: ir.Model, *, round_inputs: bool = False) -> bytes:
    """As TensorRT gets it; inputs of products are rounded only where that is asked for: the reference does not."""
    from doge_deploy.targets.trt.lowering import lower

    return _bytes(lower(model, round_inputs=round_inputs))


def _load(file: Path) -> ir.Model:
    import onnx_ir as ir

    return ir.load(file)


def _bytes(model: ir.Model) -> bytes:
    import onnx_ir as ir

    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def without_spinning(backend: Backend[Any]) -> SessionOptions:
    """Options for runners that take turns with torch, whose threads would wait for those that spin."""
    return SessionOptions(spin=0) if "spin" in backend.session_options else SessionOptions()


def open_runners(
    bundle: Bundle,
    layout: str,
    backend: Backend[Any] | None = None,
    options: SessionOptions | None = None,
    *,
    lowering: bool = False,
) -> Runners:
    """The layout as the backend runs it, and with its selections exposed where it has any that can be shown.

    Args:
        bundle: an opened bundle.
        layout: of the bundle.
        backend: the default one where None.
        options: of both; the defaults where None, without threads that spin.
        lowering: run the standard graph as it is lowered for TensorRT, without what it rounds beside weights; only in a
            backend that runs graphs.
    """
    backend = find(DEFAULT_BACKEND) if backend is None else backend
    options = without_spinning(backend) if options is None else options
    chosen = bundle.layout(layout)
    if lowering:
        require_graph_packages("verify --lowering")
        if holds_window(bundle):
            return _open_bounded(bundle, chosen, backend, options)
        source = bundle.path / chosen.file
        plain = backend.open(bundle, chosen, options, graph=_lowered(_load(source)))
    else:
        plain = backend.open(bundle, chosen, options)
    if not chosen.keep_window and not bundle.manifest.facts.is_moe:
        return Runners(plain, None, backend=backend)
    if not backend.shows_selections:
        return Runners(plain, None, hides_selections=True, backend=backend)
    if not backend.runs_graphs:
        return Runners(plain, plain, backend=backend)
    if not _graphs_can_be_changed():
        return Runners(plain, None, hides_selections=True, backend=backend)
    model = _exposed(bundle, layout, bundle.path / (chosen.file if lowering else backend.runs(chosen, options)))
    graph = _lowered(model) if lowering else _bytes(model)
    return Runners(plain, backend.open(bundle, chosen, options, graph=graph), backend=backend)


def holds_window(bundle: Bundle) -> bool:
    """Whether the cache of an engine of native layers holds the window instead of the text."""
    from doge_deploy.targets.trt.bounded.choices import window_of

    manifest = bundle.manifest
    return bool(window_of(manifest.facts, manifest.max_length, inlined=manifest.options.inline_functions))


def _open_bounded(bundle: Bundle, layout: Layout, backend: Backend[Any], options: SessionOptions) -> Runners:
    """Both graphs of an engine whose cache holds the window, driven by the runner of engines."""
    from doge_deploy.graph.passes.expose_selections import ExposeSelectionsPass
    from doge_deploy.graph.schemas import CDMOE
    from doge_deploy.runtime.trt.lowered import open_lowered

    def show_experts(model: ir.Model) -> ir.Model:
        return ExposeSelectionsPass([CDMOE])(model).model

    def opened(*, exposed: bool) -> BundleRunner:
        experts = show_experts if exposed and bundle.manifest.facts.is_moe else None
        return open_lowered(
            bundle, layout, exposed=exposed, expose_experts=experts, threads=options.threads, spin=options.spin
        )

    return Runners(opened(exposed=False), opened(exposed=True), backend=backend)


def _graphs_can_be_changed() -> bool:
    """Whether the packages for that are here: where a bundle only runs, they need not be."""
    try:
        require_graph_packages("verify")
    except MissingDependencyError:
        return False
    return True


def _exposed(bundle: Bundle, layout: str, file: Path) -> ir.Model:
    """The graph in `file` with its selections as further outputs."""
    from doge_deploy.graph.passes.expose_selections import ExposeSelectionsPass
    from doge_deploy.graph.schemas import CDMOE, DYNAMIC_MASK_ATTENTION, ROUTED_EXPERTS, WINDOW_BIAS

    operators = [DYNAMIC_MASK_ATTENTION, WINDOW_BIAS] if bundle.layout(layout).keep_window else []
    operators += [CDMOE, ROUTED_EXPERTS] if bundle.manifest.facts.is_moe else []
    return ExposeSelectionsPass(operators)(_load(file)).model
