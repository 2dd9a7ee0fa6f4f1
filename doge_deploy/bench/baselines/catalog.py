"""Every baseline by name: what it needs, and the module that makes and opens it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from doge_deploy.devices.packages import EXPORT_PACKAGES, require_packages
from doge_deploy.errors import MissingDependencyError

if TYPE_CHECKING:
    from doge_deploy.bench.candidates import Candidate
    from doge_deploy.bench.workload import Workload
    from doge_deploy.bundle.opening import Bundle
    from doge_deploy.checkpoint import Checkpoint
    from doge_deploy.runtime.base import Runner


class LeftOut(Exception):
    """A baseline cannot be timed here; the message says why, in one line."""


@dataclass(frozen=True)
class Baseline:
    """Something that people run instead of a bundle."""

    name: str
    """What `--against` takes."""
    extra: str
    """The extra of doge-deploy that brings its packages."""
    packages: tuple[str, ...]
    """As they are called in the package index."""
    module: str
    """In this package; see `Module`."""
    loads_checkpoint: bool = False
    """transformers loads the checkpoint for it, which must then be one that transformers reads as `export` does."""

    def load(self) -> Module:
        """Its module, without the libraries that it runs."""
        return cast("Module", _import(self.module))

    def require(self) -> None:
        """Raises LeftOut where a package is not installed."""
        try:
            require_packages(self.packages, user=f"bench --against {self.name}", extra=self.extra)
        except MissingDependencyError as missing:
            raise LeftOut(str(missing)) from None


class Module(Protocol):
    """What a module of a baseline has."""

    LIBRARIES: tuple[str, ...]
    """Modules that are imported before loading is timed."""

    def candidates(self, wanted: Wanted) -> list[Candidate]:
        """What is to be timed; files that are missing are made, and kept.

        Raises:
            LeftOut: nothing of it can be timed here.
            DogeDeployError: files cannot be made.
        """

    def open_runner(self, candidate: Candidate, threads: int) -> Runner:
        """One of `candidates`, loaded and ready to run with `threads` threads.

        Raises:
            DogeDeployError: it cannot be loaded.
        """


@dataclass(frozen=True)
class Wanted:
    """What baselines are made for."""

    bundles: Sequence[Bundle]
    """Of one checkpoint; baselines compute in the dtype of the first."""
    checkpoint: Checkpoint
    workloads: Sequence[Workload]
    cache: Path
    """Where files are kept for the next time."""
    make: Callable[[str, dict[str, Any]], None] = field(compare=False)
    """Calls `make` of a module of this package, by name, in a process that times nothing."""
    started: Callable[[str], None] = field(default=lambda what: None, compare=False)
    """Told what is about to be done."""


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("transformers", "export", EXPORT_PACKAGES, "eager", loads_checkpoint=True),
        Baseline("naive", "export", EXPORT_PACKAGES, "naive", loads_checkpoint=True),
        Baseline("compile", "export", EXPORT_PACKAGES, "compiled", loads_checkpoint=True),
        Baseline("genai", "genai", ("onnxruntime-genai",), "genai"),
        Baseline("openvino", "openvino", ("openvino",), "openvino"),
        Baseline("llama.cpp", "llama", ("llama-cpp-python", "gguf"), "llama_cpp"),
    )
}


def _import(module: str) -> ModuleType:
    return importlib.import_module(f"doge_deploy.bench.baselines.{module}")


def make(module: str, **request: Any) -> None:
    """Let a module of this package write what its candidates need; the arguments are the module's own."""
    _import(module).make(**request)
