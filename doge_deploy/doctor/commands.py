"""What this machine can do: one row per command and backend, with the reason and the remedy where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from doge_deploy.devices.versions import at_least
from doge_deploy.doctor.machine import Machine
from doge_deploy.doctor.probe import EXPORT, TRITON, by_demand
from doge_deploy.errors import MissingDependencyError
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.targets.backend import Backend, Library, find, names
from doge_deploy.targets.deployment import Obstacle


@dataclass(frozen=True)
class CommandStatus:
    """A command, or a part of one, and whether it works here."""

    name: str
    usable: bool
    reason: str
    """What it works with, or why it does not."""
    remedy: str = ""


def commands(machine: Machine) -> list[CommandStatus]:
    """All rows."""
    export = _packages(machine, EXPORT)
    rows = [_row(machine, "export", EXPORT[:2], [export])]
    default = find(DEFAULT_BACKEND)
    judging = [_library(machine, library) for library in default.libraries]
    rows.append(
        _row(
            machine,
            "verify",
            (*EXPORT[:2], *default.libraries[:1]),
            [export, *judging],
        )
    )
    rows.append(_row(machine, "verify --recording", default.libraries[:1], judging))
    for backend in by_demand():
        rows += _backend_rows(machine, backend)
    rows += _broken_backends()
    rows.append(_row(machine, "plugins", (TRITON,), [_library(machine, TRITON)]))
    return rows


def _backend_rows(machine: Machine, backend: Backend[Any]) -> Iterator[CommandStatus]:
    own, others = backend.libraries[:1], backend.libraries[1:]
    runs = [_library(machine, library) for library in own]
    gpu = _gpu(machine, backend) if backend.needs_gpu else None
    if backend.builds:
        name = f"build --target {backend.name}"
        yield _row(machine, name, own, [*runs, gpu if backend.build_needs_gpu else None])
    besides = [_library(machine, library) for library in others]
    yield _row(machine, f"generate --backend {backend.name}", own, [*runs, gpu, *besides])


def _broken_backends() -> Iterator[CommandStatus]:
    for name in names():
        try:
            find(name)
        except MissingDependencyError as error:
            yield CommandStatus(f"generate --backend {name}", False, str(error), "install its package again")


def _row(machine: Machine, name: str, uses: tuple[Library, ...], obstacles: list[Obstacle | None]) -> CommandStatus:
    found = [obstacle for obstacle in obstacles if obstacle is not None]
    if not found:
        with_what = ", ".join(f"{one.key} {machine.libraries[one.key].version}" for one in uses)
        return CommandStatus(name, True, with_what or "needs no library")
    return CommandStatus(
        name,
        False,
        "; ".join(obstacle.reason for obstacle in found),
        "; ".join(dict.fromkeys(obstacle.remedy for obstacle in found)),
    )


def _packages(machine: Machine, needed: tuple[Library, ...]) -> Obstacle | None:
    """All that are missing in one sentence; one extra brings them."""
    missing = [library for library in needed if machine.libraries[library.key].version is None]
    if not missing:
        return None
    return Obstacle(f"no {', '.join(library.key for library in missing)}", _install(missing[0]))


def _library(machine: Machine, library: Library) -> Obstacle | None:
    name, found = library.key, machine.libraries[library.key]
    if found.version is None:
        return Obstacle(f"no {name}", _install(library))
    if library.first_version and found.version != "unknown" and not at_least(found.version, library.first_version):
        on_jetson = library.jetson_remedy if machine.board else ""
        return Obstacle(
            f"{library.title or name} {found.version} is older than {library.first_version}",
            on_jetson or _install(library) + " --upgrade",
        )
    if found.problem:
        return Obstacle(
            f"{name} {found.version} is installed but does not load: {found.problem}",
            f"install it again: {_install(library)} --force-reinstall",
        )
    return None


def _gpu(machine: Machine, backend: Backend[Any]) -> Obstacle | None:
    """A GPU that the backend can use."""
    if machine.driver is None and not machine.gpus:
        return Obstacle("no NVIDIA driver", "a machine with an NVIDIA GPU and its driver")
    if not machine.gpus:
        return Obstacle(
            f"driver {machine.driver}, but nvidia-smi lists no GPU",
            "see what `nvidia-smi` says; in a container, --gpus all",
        )
    known = [gpu.compute_capability for gpu in machine.gpus if gpu.compute_capability]
    # nvidia-smi does not tell it on a Jetson; the library will
    return backend.gpu_obstacle(known) if known else None


def _install(library: Library) -> str:
    first = f"pip uninstall {library.module}, then " if library.shares_module else ""
    return f"{first}pip install 'doge-deploy[{library.extra}]'"
