"""The networks that an engine is made of: one, or two where its cache holds the window instead of the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from doge_deploy.bundle.engine_record import EngineProfile, EngineTensor, Interface
from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.bundle.signature import SEQUENCE, GraphTensor, Signature, bounded
from doge_deploy.options.build import BuildOptions
from doge_deploy.targets.trt.profiles import make_profiles

if TYPE_CHECKING:
    from doge_deploy.targets.trt.bounded.lowering import BoundedAttentionPass


@dataclass(frozen=True)
class Part:
    """A network to build."""

    profiles: tuple[EngineProfile, ...]
    signature: Signature
    engine_file: str = "model.engine"
    report_file: str = "layers.json"
    """In the engine's folder."""
    window: int = 0
    """Slots of the cache; 0: one for each token."""
    decode: bool = True
    """With `window`: the network for calls of one token, else that for more."""

    def bounded_pass(self, *, exposed: bool = False) -> BoundedAttentionPass | None:
        """What gives a static graph its bounded cache; None where it has none. `exposed`: see there."""
        if not self.window:
            return None
        from doge_deploy.targets.trt.bounded.bodies import DECODE, PREFILL
        from doge_deploy.targets.trt.bounded.lowering import BoundedAttentionPass

        longest = max(profile.axes[SEQUENCE].max for profile in self.profiles)
        kind = DECODE if self.decode else PREFILL
        return BoundedAttentionPass(kind, window=self.window, longest_call=longest, exposed=exposed)


def interface_of(part: Part, aliases: Mapping[str, str]) -> Interface:
    """What a network of that part takes, before any was built.

    Args:
        part: the network.
        aliases: present outputs that its graph writes in place, with their past inputs.
    """

    def tensors(specs: tuple[GraphTensor, ...]) -> tuple[EngineTensor, ...]:
        return tuple(EngineTensor(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in specs)

    signature = part.signature
    return Interface(
        profiles=part.profiles,
        inputs=tensors(signature.inputs),
        outputs=tensors(signature.outputs),
        aliases=dict(aliases),
    )


def make_parts(
    bundle: Bundle,
    signature: Signature,
    options: BuildOptions,
    kind: Literal["shared", "separate"],
    *,
    use_plugins: bool,
) -> tuple[Part, ...]:
    """The networks of one engine, the one that decodes first.

    Args:
        bundle: what it is built of.
        signature: of the static layout.
        options: what the user chose.
        kind: of the profiles, where there is one network; see `make_profiles`.
        use_plugins: attention is a plugin, whose kernels rank all slots of a cache that holds the text.

    Raises:
        UsageError: the ranges do not fit the bundle.
    """
    from doge_deploy.targets.trt.bounded.choices import bounded_profiles, window_of

    manifest = bundle.manifest
    window = 0
    if not use_plugins:
        window = window_of(manifest.facts, manifest.max_length, inlined=manifest.options.inline_functions)
    if not window:
        return (Part(make_profiles(options, manifest.max_length, kind), signature),)
    decode, prefill = bounded_profiles(options, manifest.facts, manifest.max_length, whole_calls=manifest.whole_calls)
    parts = [Part(decode, bounded(signature, window, decode=True), window=window)]
    if prefill:
        expected = bounded(signature, window, decode=False)
        parts.append(Part(prefill, expected, "prefill.engine", "prefill_layers.json", window, decode=False))
    return tuple(parts)


def lowered_parts(bundle: Bundle, layout: Layout) -> list[bytes]:
    """The graphs that an engine of native layers is built of where nothing is chosen, the one that decodes first.

    Raises:
        UnsupportedModelError: the graph cannot be lowered.
    """
    from doge_deploy.targets.trt.layout import lower_layout

    options = BuildOptions.model_validate({})
    parts = make_parts(bundle, layout.signature, options, "shared", use_plugins=False)
    return [lower_layout(bundle, layout, use_plugins=False, bounded=part.bounded_pass()).serialized() for part in parts]
