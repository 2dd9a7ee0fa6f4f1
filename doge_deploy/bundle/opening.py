"""Open a bundle: read its manifest, check it whole, check its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_deploy.bundle.consistency import read_manifest
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


def open_bundle(path: str | Path, *, check: str = "full") -> Bundle:
    """Open a bundle and check its files.

    Args:
        path: the directory.
        check: "full" hashes every file; "quick" hashes small ones and compares the size of the others.

    Raises:
        UsageError: there is no such directory.
        BrokenBundleError: not a bundle, a manifest that is wrong, or files missing or altered (all are named).
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory; give a bundle that `doge-deploy export` wrote")
    manifest = load_manifest(path)
    problems = list(file_problems(path, manifest.files, quick=check == "quick"))
    if problems:
        raise BrokenBundleError(f"{path}: {join_findings(problems)}; export it again")
    return Bundle(path, manifest)


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
