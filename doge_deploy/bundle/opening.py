"""Open a bundle: read its manifest, check it whole, check its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_deploy.bundle.consistency import read_manifest
from doge_deploy.bundle.file_check import FileCheck
from doge_deploy.bundle.files import MANIFEST, file_problems
from doge_deploy.bundle.manifest import Layout, Manifest
from doge_deploy.bundle.typed_json import no_constant, no_duplicates
from doge_deploy.diagnostics import join_findings
from doge_deploy.errors import BrokenBundleError, UsageError

if TYPE_CHECKING:
    from doge_deploy.bundle.engine_record import EngineRecord


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest
    check: FileCheck | None = field(default=None, compare=False, repr=False)
    """Of its files, where that may still be going on."""

    def prove(self) -> None:
        """Wait until all files are checked that `open_bundle` was asked to check; nothing where it waited itself.

        Who opens a bundle without waiting calls this before anything that was computed from its files is given out.

        Raises:
            BrokenBundleError: files are missing or altered (all are named).
            OSError: one cannot be read.
        """
        if self.check is not None and (problems := self.check.problems()):
            raise _broken(self.path, problems)

    @contextmanager
    def damage_first(self) -> Iterator[None]:
        """Whatever the body raises, what is wrong with the files is said in its place."""
        try:
            yield
        except Exception:
            self.prove()
            raise

    def layout(self, name: str | None = None) -> Layout:
        """The layout called `name`, or the bundle's first.

        Raises:
            UsageError: the bundle has no such layout.
        """
        layouts = self.manifest.layouts
        if name is None:
            return next(iter(layouts.values()))
        if name not in layouts:
            raise UsageError(f"{self.path} has no {name!r} layout; it holds: {', '.join(layouts)}")
        return layouts[name]

    def engine(self, name: str | None = None) -> EngineRecord:
        """The engine called `name`, or the bundle's only one.

        Raises:
            UsageError: the bundle has no such engine, or several and none was named.
        """
        engines = self.manifest.engines
        if name is not None and name in engines:
            return engines[name]
        if name is None and len(engines) == 1:
            return next(iter(engines.values()))
        held = ", ".join(engines) or "none; make one with `doge-deploy build`"
        asked = "several engines, name one of them" if name is None and engines else f"no engine {name or ''}".rstrip()
        raise UsageError(f"{self.path} has {asked}; it holds: {held}")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the bundle, or {} where it has no such file.

        Raises:
            BrokenBundleError: the file is not a JSON object.
        """
        if name not in self.manifest.files:
            return {}
        try:
            data = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BrokenBundleError(f"{self.path / name} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise BrokenBundleError(f"{self.path / name} holds a {type(data).__name__}; must be a JSON object")
        return data


def open_bundle(path: str | Path, *, check: str = "full", wait: bool = True) -> Bundle:
    """Open a bundle and check its files.

    Args:
        path: the directory.
        check: "full" hashes every file; "quick" hashes small ones and compares the size of the others.
        wait: False returns while large files are still being hashed; see `Bundle.prove`.

    Raises:
        UsageError: there is no such directory.
        BrokenBundleError: not a bundle, a manifest that is wrong, or files missing or altered (all are named).
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(
            f"{path} is not a directory; give a bundle, as `doge-deploy export MODEL -o {path}` writes one"
        )
    manifest = load_manifest(path)
    quick = check == "quick"
    if not wait:
        return Bundle(path, manifest, FileCheck(path, manifest.files, quick=quick))
    if problems := list(file_problems(path, manifest.files, quick=quick)):
        raise _broken(path, problems)
    return Bundle(path, manifest)


def _broken(path: Path, problems: list[str]) -> BrokenBundleError:
    return BrokenBundleError(f"{path}: {join_findings(problems)}; export it again")


def load_manifest(directory: Path) -> Manifest:
    """The manifest of a bundle, checked whole; of the files nothing is looked at.

    Raises:
        BrokenBundleError: there is none, or it is wrong; every finding is named, in one line.
    """
    file = directory / MANIFEST
    try:
        document: Any = json.loads(
            file.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant
        )
    except FileNotFoundError:
        raise BrokenBundleError(f"{directory} has no {MANIFEST}: not a bundle of `doge-deploy export`") from None
    except OSError as error:
        raise BrokenBundleError(f"{file} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise BrokenBundleError(f"{file} is no manifest: its values are nested too deeply") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise BrokenBundleError(f"{file} is not valid JSON: {error}; export the bundle again") from error
    findings: list[str] = []
    manifest = read_manifest(document, findings)
    if manifest is None:
        raise BrokenBundleError(f"{file}: {join_findings(findings)}")
    return manifest
