"""Backends: what runs a bundle, and what is lowered for it at export.

A package brings its own through the entry point group `doge_deploy.backends`; the entry point names a `Backend`. The
names are known without loading any of them. ONNX Runtime, TensorRT and TensorRT-RTX register through the same group;
the default is found without asking what is installed, since `generate` would spend a tenth of its time on that.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from doge_deploy.diagnostics import joined, suggest
from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.options.backends import DEFAULT_BACKEND

if TYPE_CHECKING:  # the help of a command lists the names, and must not wait for the rest
    from importlib.metadata import EntryPoint

    from doge_deploy.bundle.manifest import Layout, Lowered
    from doge_deploy.bundle.opening import Bundle
    from doge_deploy.devices.facts import DeviceFacts
    from doge_deploy.targets.deployment import Constraints, DeployableModel, Held, Obstacle

GROUP = "doge_deploy.backends"

DEFAULT_MODULE = "doge_deploy.runtime.ort.backend"
"""Where the default backend is; its entry point says the same."""

RunnerT = TypeVar("RunnerT")
"""What `open` gives: a `doge_deploy.runtime.base.BundleRunner`, which this package may not import."""


@dataclass(frozen=True)
class Library:
    """A Python package that something needs."""

    module: str
    """What Python imports."""
    extra: str
    """The extra of doge-deploy that brings it."""
    distributions: tuple[str, ...] = ()
    """Names under which it is installed, the first that is found gives the version; the module's where empty."""
    probe: str = ""
    """What `doctor` runs in a process of its own once `module` is imported, to see that the native part is there too,
    and to fill the dictionary `found`; empty: it is not loaded, its presence is enough."""
    first_version: str = ""
    """The oldest that will do; empty for any."""
    title: str = ""
    """For people; the module's name where empty."""
    shares_module: bool = False
    """Other packages are the same module: it is there only where one of `distributions` is installed."""
    jetson_remedy: str = ""
    """How a newer one comes to a Jetson; empty: as anywhere else."""

    @property
    def key(self) -> str:
        """What it is called among others: the module, or the package where several are the same module."""
        return self.distributions[0] if self.shares_module else self.module


@dataclass(frozen=True)
class SessionOptions:
    """What can be asked of a runner when it is opened."""

    portable: bool = False
    """Run the standard graph where the bundle also holds one that was lowered for the backend."""
    threads: int | None = None
    """CPU threads; the backend's own choice where None."""
    engine: str | None = None
    """The name of an engine, where the bundle holds several."""
    flush_denormals: bool = False
    """A hint: numbers below 1.2e-38 may count as zero."""
    spin: int | None = None
    """Microseconds that an idle CPU thread waits for work before it sleeps; the backend's own choice where None."""
    graph_cache: bool = True
    """A hint: what a library makes of a graph when it loads it may be kept on disk for the next time."""
    leaves_interpreter: Callable[[], None] | None = None
    """A hint: called where the library is about to load the model without Python, which other threads may use then."""

    def given(self) -> dict[str, Any]:
        """The options that a user gave, by name; hints are not among them."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in HINTS and getattr(self, field.name) != field.default
        }


HINTS = frozenset({"flush_denormals", "graph_cache", "leaves_interpreter"})
"""Options that a backend may ignore without a word."""


class Backend(ABC, Generic[RunnerT]):
    """One way to run a bundle. Instances hold no state; their attributes are facts."""

    name: str
    """What `--backend` takes."""
    title: str
    """For people: `ONNX Runtime`."""
    libraries: tuple[Library, ...] = ()
    """What must be installed to open a bundle, the one that runs it first."""
    needs_gpu: bool = False
    """`open` needs an NVIDIA GPU, and a bundle lies in that GPU's memory."""
    builds: bool = False
    """`build` makes engines for it, with the first of `libraries`."""
    build_needs_gpu: bool = False
    """Only on the device that the engine is for."""
    layouts: tuple[str, ...] = ()
    """Layouts that it runs."""
    lowers: tuple[str, ...] = ()
    """Layouts for which `export` calls `lower`."""
    lowers_when_asked: bool = False
    """Only where the export's `lower_for` names it: a bundle does without, and is lowered when it is opened."""
    session_options: frozenset[str] = frozenset()
    """Fields of `SessionOptions` that it takes; hints need not be named."""
    runs_graphs: ClassVar[bool] = False
    """`open` runs a changed graph that is given to it."""
    proves_bundles: ClassVar[bool] = False
    """`open` takes a bundle whose files are still being checked, and calls `Bundle.prove` itself before it reads them.
    """
    shows_selections: ClassVar[bool] = False
    """What the graph selects (keys, experts) can be seen: in `BundleRunner.extra`, of a graph that gives it as further
    outputs where `runs_graphs`, else in every call. What depends on hidden selections is not judged by `verify`."""

    def lower(self, directory: Path, layout: Layout) -> Lowered | None:
        """Write the layout's graph in the backend's own form beside the standard one; called for layouts in `lowers`.

        Args:
            directory: of the new bundle; it holds the standard graph and the weights.
            layout: one of them.

        Returns:
            What the manifest shall say; None where there is nothing to say.
        """
        return None

    @abstractmethod
    def open(self, bundle: Bundle, layout: Layout, options: SessionOptions, *, graph: bytes | None = None) -> RunnerT:
        """A runner of one layout of a bundle.

        Args:
            bundle: an opened bundle.
            layout: of the bundle, as `choose_layout` gives it.
            options: those that are given are in `session_options`.
            graph: a changed graph of the layout to run in place of the bundle's; only where `runs_graphs`.

        Raises:
            UsageError: the bundle holds nothing that the backend could run.
            MissingDependencyError: a library, a driver or a device is missing.
            BrokenBundleError, UnsupportedModelError: the library refuses the graph.
        """

    def on_processor(self) -> Backend[Any] | None:
        """The same lowering where there is no GPU, for `verify --lowering-for`; None: it has none."""
        return None

    def require(self, bundle: Bundle) -> None:
        """Raises UsageError where a bundle lacks what the backend runs, such as an engine; loads no library."""

    def runs(self, layout: Layout, options: SessionOptions) -> str:
        """What of a layout is run: the file of the bundle where `runs_graphs`, else some words."""
        return layout.file

    def obstacle(self, runner: RunnerT, calls: Sequence[tuple[int, int]]) -> str | None:
        """Why a case of `verify` cannot be run beyond what `Runner.refusal` says of its calls; None: it can.

        Args:
            runner: one that `open` gave.
            calls: rows and tokens of each call, padding included.
        """
        return None

    def default_dtype(self, constraints: Constraints) -> str:
        """`fp32`, `fp16` or `bf16`: what a model is exported in for this backend where nobody asks for another."""
        return "fp32"

    def lowering(self, device: DeviceFacts, constraints: Constraints) -> str:
        """What of a bundle a device would run, in a word."""
        return "standard"

    def device_obstacles(self, device: DeviceFacts, dtype: str) -> Iterator[Obstacle]:
        """Why a device cannot run anything in `dtype`, the most fundamental reason first; memory is not looked at."""
        yield from ()

    def gpu_obstacle(self, capabilities: Sequence[str]) -> Obstacle | None:
        """Why none of a machine's GPUs will do; asked where `needs_gpu`.

        Args:
            capabilities: their compute capabilities, such as `8.7`; at least one.
        """
        return None

    def model_obstacles(self, model: DeployableModel, dtype: str, lowering: str) -> Iterator[Obstacle]:
        """Why a model cannot be run on any device, the most fundamental reason first.

        Args:
            model: a checkpoint or a bundle.
            dtype: `fp32`, `fp16` or `bf16`.
            lowering: what `lowering` gave.
        """
        if not set(model.layouts) & set(self.layouts):
            from doge_deploy.targets.deployment import Obstacle

            yield Obstacle(
                f"{model.name} holds {', '.join(model.layouts)}, and {self.name} runs {joined(self.layouts)}",
                "use another backend",
            )

    def held(self, model: DeployableModel, lowering: str) -> Held:
        """What it holds in memory while it runs a model.

        Args:
            model: a checkpoint or a bundle.
            lowering: what `lowering` gave.
        """
        from doge_deploy.targets.deployment import Held

        return Held(slots=model.max_length, longest_call=model.max_length)

    def build_bytes(self, fp16_weight_bytes: int) -> int | None:
        """Memory of a build that must be made on the device itself; None where there is none.

        Args:
            fp16_weight_bytes: what the model's weights take in fp16.
        """
        return None

    def import_libraries(self) -> None:
        """Import what `open` needs, so that `bench` can time the opening without it.

        Raises:
            MissingDependencyError: something is not installed.
        """
        for library in self.libraries:
            try:
                importlib.import_module(library.module)
            except ImportError as error:
                raise MissingDependencyError(
                    f"{self.title} needs {library.module}, which cannot be imported ({error}): "
                    f"pip install 'doge-deploy[{library.extra}]'"
                ) from error

    def choose_layout(self, bundle: Bundle, name: str | None = None) -> Layout:
        """The layout called `name`, or the bundle's first that this backend runs.

        Raises:
            UsageError: the bundle has no such layout, or the backend does not run it.
        """
        if name is not None and name not in self.layouts:
            takers = _owners(lambda other: name in other.layouts)
            belongs = f"--layout {name} belongs to --backend {takers}; " if takers else f"--layout {name}: "
            raise UsageError(f"{belongs}{self.name} runs {joined(self.layouts)}")
        held = [one for one in bundle.manifest.layouts if one in self.layouts]
        if name is None and not held:
            raise UsageError(
                f"{bundle.path} holds {', '.join(bundle.manifest.layouts)}, and {self.name} runs "
                f"{' and '.join(self.layouts)}: export with --kv-cache {self.layouts[0]}, or use another --backend"
            )
        return bundle.layout(held[0] if name is None else name)

    def check_options(self, options: SessionOptions) -> None:
        """Raises UsageError where an option is given that this backend does not take."""
        for option in options.given():
            if option not in self.session_options:
                takers = _owners(lambda other, option=option: option in other.session_options)
                raise UsageError(
                    f"--{option} belongs to --backend {takers}; {self.name} does not take it"
                    if takers
                    else f"--{option}: no backend takes it"
                )


def _owners(takes: Any) -> str:
    """Names of the installed backends of which something holds; those that cannot be loaded are passed over."""
    return " or ".join(backend.name for backend in loadable() if takes(backend))


def names() -> tuple[str, ...]:
    """Every installed backend, the default first, the others in alphabetical order. Loads none of them."""
    return tuple(sorted(_entries(), key=lambda name: (name != DEFAULT_BACKEND, name)))


def check_name(name: str, *more: str) -> str:
    """`name`, which is that of an installed backend or one of `more`.

    Raises, where it is not the default's:
        UsageError: it is not.
        MissingDependencyError: no backend is registered, not even those of this package.
    """
    if name == DEFAULT_BACKEND:
        return name
    known = (*names(), *more)
    if not _entries():
        raise MissingDependencyError(
            "no backend is registered: this installation of doge-deploy is incomplete; install it again"
        )
    if name not in known:
        raise UsageError(f"unknown backend {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    return name


@cache
def find(name: str) -> Backend[Any]:
    """The backend called `name`.

    Raises:
        UsageError: there is none.
        MissingDependencyError: its entry point cannot be loaded, or names something else.
    """
    if name == DEFAULT_BACKEND:
        default: Backend[Any] = importlib.import_module(DEFAULT_MODULE).BACKEND
        return default
    return _load(_entries()[check_name(name)])


def backends() -> Iterator[Backend[Any]]:
    """Every installed backend, in the order of `names`; raises what `find` raises."""
    return map(find, names())


def loadable() -> Iterator[Backend[Any]]:
    """The same without those that cannot be loaded."""
    for name in names():
        with suppress(MissingDependencyError):
            yield find(name)


@cache
def _entries() -> dict[str, EntryPoint]:
    return unique(entry_points(group=GROUP))


def entry_points(group: str) -> Iterable[EntryPoint]:
    """What installed packages bring."""
    from importlib import metadata  # its import takes as long as asking every package

    return metadata.entry_points(group=group)


def unique(entries: Iterable[EntryPoint]) -> dict[str, EntryPoint]:
    """Entry points by name.

    Raises:
        UsageError: two packages bring a backend of the same name, so that it is not clear which one is meant.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entries:
        before = found.setdefault(entry.name, entry)
        if before.value != entry.value:
            raise UsageError(
                f"backend {entry.name!r} is brought by {_origin(before)} and by {_origin(entry)}; uninstall one of them"
            )
    return found


def _load(entry: EntryPoint) -> Backend[Any]:
    try:
        backend = entry.load()
    except Exception as error:  # whatever someone else's package raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MissingDependencyError(
            f"backend {entry.name!r} of {_origin(entry)} cannot be loaded from {entry.value}: {reason}"
        ) from error
    if not isinstance(backend, Backend) or backend.name != entry.name:
        called = f" called {backend.name!r}" if isinstance(backend, Backend) else ""
        raise MissingDependencyError(
            f"backend {entry.name!r} of {_origin(entry)}: {entry.value} is a {type(backend).__name__}{called}, must be "
            f"a Backend called {entry.name!r}"
        )
    return backend


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


def forget() -> None:
    """Look the entry points up anew, in a process that has installed a package since."""
    find.cache_clear()
    _entries.cache_clear()
