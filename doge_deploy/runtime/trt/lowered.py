"""The two graphs of a bounded cache in ONNX Runtime, driven by the runner of engines: what `verify --lowering` judges.

Axes: B rows, Q tokens of a call, Hkv key heads, w slots, P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.options.build import BuildOptions
from doge_deploy.runtime.base import IntArray
from doge_deploy.runtime.logits import Logits
from doge_deploy.runtime.ort.session import open_session
from doge_deploy.runtime.rows import ChangingAngles, row_range
from doge_deploy.runtime.trt.bounded import BoundedTrtRunner
from doge_deploy.runtime.trt.in_ort import HostDevice, OrtEngine
from doge_deploy.runtime.trt.plan import BindingPlan, kv_heads_of, plan_of

if TYPE_CHECKING:
    import onnx_ir as ir

KEPT_UNTIL, KEPT_POSITIONS = "kept_until", "kept_positions"
"""Outputs of a lowered prefill, one each layer: see `doge_deploy.targets.trt.bounded.bodies`."""

MOST_ROWS = 64
"""Rows of a call: a profile has to name a number."""


class LoweredBoundedRunner(BoundedTrtRunner):
    """The same on sessions that show what they select: `extra` has `kept.<layer>` `[B, Hkv, Q, P]`, and the experts of
    a mixture.
    """

    def _run_piece(self, first: int, input_ids: IntArray, lengths: IntArray) -> Logits:
        logits = super()._run_piece(first, input_ids, lengths)
        rows, width = input_ids.shape
        started = self.row_lengths[row_range(first, rows)]
        is_step = width == 1 and bool((lengths == 1).all())
        engine = self._engine if is_step or self._prefill is None else self._prefill[0]
        assert isinstance(engine, OrtEngine)
        shown = {name: value for name, value in engine.extra.items() if not name.startswith(f"{KEPT_UNTIL}.")}
        held = self._positions() if is_step else {}
        for layer in range(len({cache.past.split(".")[1] for cache in self.plan.caches})):
            if is_step:
                positions = held[layer][row_range(first, rows)]
                until = np.ones_like(positions)
            else:
                shape = (rows, -1, self.window + width)
                positions = shown.pop(f"{KEPT_POSITIONS}.{layer}").reshape(shape).astype(np.int64) - 1
                until = engine.extra[f"{KEPT_UNTIL}.{layer}"].reshape(shape)
            shown[f"kept.{layer}"] = _kept(positions, until, started, width)
        self.extra = shown
        return logits


def _kept(positions: IntArray, until: np.ndarray[Any, Any], started: IntArray, width: int) -> np.ndarray[Any, Any]:
    """Which keys the tokens of a call see, by position, `[B, Hkv, Q, P]`.

    Args:
        positions: the token in each slot, -1 for none, `[B, Hkv, S]`.
        until: before which token of the call each is seen, `[B, Hkv, S]`.
        started: position of the first token, `[B]`.
        width: Q.
    """
    kept = np.zeros((*positions.shape[:2], width, int(started.max()) + width), bool)
    for token in range(width):
        is_seen = (positions >= 0) & (positions <= started[:, None, None] + token) & (token < until)
        row, head, slot = np.nonzero(is_seen)
        kept[row, head, token, positions[row, head, slot]] = True
    return kept


def open_lowered(
    bundle: Bundle,
    layout: Layout,
    *,
    exposed: bool = False,
    options: BuildOptions | None = None,
    expose_experts: Callable[[ir.Model], ir.Model] | None = None,
    threads: int | None = None,
    spin: int | None = None,
) -> BoundedTrtRunner:
    """A runner of the graphs that an engine of native layers is built of, where its cache holds the window.

    Args:
        bundle: an opened bundle.
        layout: its static one.
        exposed: see `LoweredBoundedRunner`.
        options: of the build; its defaults, for up to `MOST_ROWS` rows, where None.
        expose_experts: makes the experts of a mixture outputs of a graph; nothing where None.
        threads, spin: see `open_session`.

    Raises:
        UnsupportedModelError: the graph cannot be lowered.
    """
    import onnx_ir as ir

    from doge_deploy.targets.trt.layout import LoweredLayout
    from doge_deploy.targets.trt.lowering import lower
    from doge_deploy.targets.trt.parts import interface_of, make_parts

    options = options or BuildOptions.model_validate({"batch_size": [1, 1, MOST_ROWS]})
    device, manifest = HostDevice(), bundle.manifest
    networks: list[tuple[OrtEngine, BindingPlan]] = []
    for part in make_parts(bundle, layout.signature, options, "separate", use_plugins=False):
        model = ir.load(bundle.path / layout.file)
        if expose_experts is not None:
            model = expose_experts(model)
        lowered = LoweredLayout(lower(model, bounded=part.bounded_pass(exposed=exposed), round_inputs=False))
        data = lowered.serialized()
        if manifest.dtype == "bfloat16":
            from doge_deploy.targets.ort import widen_bfloat16

            data = widen_bfloat16(data)
        interface = interface_of(part, lowered.aliases())
        engine = OrtEngine(open_session(data, bundle.path, threads=threads, spin=spin), interface, device)
        expected, heads = part.signature, kv_heads_of(layout.signature)
        plan = plan_of("the lowered graph", interface, expected, heads, in_place=part.decode)
        networks.append((engine, plan))
    (engine, plan), *others = networks
    kind = LoweredBoundedRunner if exposed else BoundedTrtRunner
    return kind(
        engine,
        device,
        plan,
        layout.signature,
        window=part.window,
        prefill=others[0] if others else None,
        max_length=manifest.max_length,
        last=manifest.last_logits,
        whole_calls=bool(manifest.whole_calls),
        angles=ChangingAngles.in_bundle(manifest),
    )
