"""What a bundle says about an engine that was built from it.

An engine is opaque, and cannot be opened on a machine without its GPU. Everything that a runtime or a reader needs to
know about it is written down when it is built.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from doge_deploy.dtypes import ShortName
from doge_deploy.options.build import BuildOptions, Range, Target

ENGINES = "engines"
"""The folder of a bundle that holds one folder per engine."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineTensor(_Record):
    """One input or output of the engine, in binding order."""

    name: str
    dtype: str
    """NumPy's spelling, as in a signature. It is what the engine wants, which may be narrower than the graph's."""
    shape: tuple[str | int, ...]
    """An axis is a size or one of the names in `signature.py`."""


class EngineProfile(_Record):
    """One optimization profile: for every axis name the sizes that are allowed."""

    name: str
    """`prefill`, `decode`, or `shared` for one that serves both."""
    axes: dict[str, Range]

    def shape(self, tensor: EngineTensor, which: Literal["min", "opt", "max"]) -> tuple[int, ...]:
        """The shape of an input at the lowest, best or highest sizes of this profile."""
        return tuple(getattr(self.axes[axis], which) if isinstance(axis, str) else axis for axis in tensor.shape)

    def allows(self, **sizes: int) -> bool:
        """Whether a call with these sizes, by axis name, fits."""
        return all(self.axes[axis].min <= size <= self.axes[axis].max for axis, size in sizes.items())


class Decomposed(_Record):
    """A layer that runs as several kernels where a fused one was hoped for."""

    layer: str
    reason: str


class LayerCounts(_Record):
    """Layers of the network that the vendor's parser made of the graph, before the builder fuses any."""

    total: int
    by_type: dict[str, int]
    kv_cache_update: int
    """In-place cache writes."""
    attention: int
    """Native attention layers."""
    decomposed: tuple[Decomposed, ...] = ()


class KernelCounts(_Record):
    """What the builder made of the layers, by its own list (all profiles together)."""

    total: int
    by_type: dict[str, int]
    by_precision: dict[str, int]
    """Of the first output, in the vendor's words; kernels without one, such as waits, are not counted."""
    fused_attention: int
    """Kernels that compute a whole attention."""
    low_bit: int = 0
    """Kernels that read weights of few bits as they are stored."""


class PluginUse(_Record):
    """A plugin that the engine needs, or carries."""

    name: str
    version: str
    namespace: str
    layers: int


class SourceFile(_Record):
    """A file that the engine was made from, as it was then."""

    file: str
    sha256: str


class Interface(_Record):
    """Inputs and outputs of a network, and which calls it takes."""

    profiles: tuple[EngineProfile, ...]
    """In the engine's own order: the index is what `set_optimization_profile_async` takes."""
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    aliases: dict[str, str]
    """Per present output the past input whose buffer it must be: the cache is written in place."""

    def tensor(self, name: str) -> EngineTensor:
        """The input or output called `name`; KeyError where there is none."""
        for tensor in (*self.inputs, *self.outputs):
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def profile_for(self, **sizes: int) -> int | None:
        """Index of the profile for a call with these sizes by axis name: of those that allow it the narrowest."""
        fitting = [
            (sum(axis.max - axis.min for axis in profile.axes.values()), index)
            for index, profile in enumerate(self.profiles)
            if profile.allows(**sizes)
        ]
        return min(fitting)[1] if fitting else None


class Network(Interface):
    """One network that was built, and the file that came of it."""

    engine_file: str
    """Relative to the bundle, as are all file names here; size and hash are in `files` of the manifest."""
    report_file: str
    """JSON: every layer of the network, and what the vendor's inspector says where it could be asked."""
    lowered_onnx_sha256: str
    """Of the graph after the lowering, as TensorRT's parser got it."""
    layers: LayerCounts
    kernels: KernelCounts | None = None
    """None where the builder did not say, as with `verbosity: none`."""
    weight_bytes: int = Field(description="bytes of the weights that the lowered graph refers to, each once")
    engine_bytes: int
    activation_bytes: int | None = None
    """Scratch memory of an execution context at the largest sizes, caches apart, as the builder says; the largest of
    the profiles."""
    engine_weight_bytes: int | None = None
    """Weights in the engine, as the builder says."""
    build_seconds: float
    """From the start of the child process to the finished file."""
    peak_memory_bytes: int
    """Largest resident set of the child process."""


class EngineRecord(Network):
    """One entry of `engines` in manifest.json.

    Where the cache holds the window instead of the text there are two networks: this one decodes, `prefill` takes calls
    of more than one token.
    """

    directory: str
    """Relative to the bundle: `engines/<target>-<dtype>-<capabilities>`."""
    target: Target
    product: str
    """`TensorRT-RTX` or `TensorRT`."""
    version: str
    """Of the product. An engine runs with the version that built it, unless a flag says otherwise."""
    platform: str
    """Operating system and processor of the builder: `linux-x86_64`."""
    dtype: ShortName
    layout: str
    """The layout of the bundle that it was built from."""
    lowering: Literal["standard", "plugins"]
    """`standard`: native layers only. `plugins`: `doge` operators are plugins."""
    plugins: tuple[PluginUse, ...] = ()
    compute_capabilities: tuple[str, ...]
    """`8.9`; empty: every GPU that the product's default covers."""
    flags: tuple[str, ...]
    """Builder flags, as the product names them."""
    strip_weights: bool
    """The weights must be put in from the bundle before use."""
    onnx: SourceFile
    """The bundle's graph."""
    weights: SourceFile
    options: BuildOptions
    window: int | None = None
    """Slots of the cache where it holds the window instead of the text; None where it has a slot for each token."""
    prefill: Network | None = None
    """With `window`: a cache and tokens in, another cache out, which takes the place of the first. None where the
    engine only decodes."""

    @property
    def networks(self) -> tuple[Network, ...]:
        """All that were built."""
        return (self,) if self.prefill is None else (self, self.prefill)
