"""The bundle: a directory that says all about itself.

    manifest.json          what it is, where it came from, the hash of every other file
    model.onnx             the graph of the first layout; model.<layout>.onnx of a second one
    model.ort.onnx         the static graph lowered for ONNX Runtime's CPU provider, where that applies
    weights.safetensors    every weight once, external data of the graphs
    config.json, generation_config.json, tokenizer files: as they were in the checkpoint
    engines/<name>/        an engine that `doge-deploy build` made of the static graph, and what was found about it

It is written aside and renamed (writing.py), so it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_deploy.bundle.signature import Signature
from doge_deploy.config.model import DogeFacts
from doge_deploy.dtypes import NAMES
from doge_deploy.errors import BrokenBundleError, UsageError

if TYPE_CHECKING:
    from doge_deploy.bundle.engine_record import EngineRecord

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_QUICK_LIMIT_BYTES = 16 * 1024 * 1024
"""A quick check hashes files up to this size and compares only the size of larger ones."""


@dataclass(frozen=True)
class Lowered:
    """What a lowering made of a layout's graph."""

    file: str | None
    """The lowered graph; None where no pass applied."""
    applied: tuple[str, ...] = ()
    """Passes that changed the graph, in order."""
    declined: Mapping[str, str] = field(default_factory=dict)
    """Passes that did not apply, each with the reason."""
    requires: str = ""
    """The oldest runtime that runs the file, where not every one that runs bundles does."""
    drops_keys: bool = False
    """The graph has the signature of `bundle.signature.windowed`: its runner drops keys that left the window."""

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "applied": list(self.applied),
            "declined": dict(self.declined),
            "requires": self.requires,
            "drops_keys": self.drops_keys,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Lowered:
        return cls(
            data["file"], tuple(data["applied"]), data["declined"], data["requires"], data.get("drops_keys", False)
        )


@dataclass(frozen=True)
class Layout:
    """One graph of the bundle."""

    file: str
    signature: Signature
    keep_window: bool
    """Whether the body of DynamicMaskAttention selects the best `keep_window_size` keys."""
    notes: tuple[str, ...] = ()
    ort: Lowered | None = None
    """For ONNX Runtime's CPU provider; None where none was tried."""


@dataclass(frozen=True)
class Manifest:
    """manifest.json, format version 1."""

    tool: Mapping[str, str]
    libraries: Mapping[str, str]
    checkpoint: Mapping[str, Any]
    """`sha256` of the weights (independent of sharding), and `source`: a bundled name, a Hub id, or null for a
    directory.
    """
    facts: DogeFacts
    options: Mapping[str, Any]
    layouts: Mapping[str, Layout]
    warnings: tuple[str, ...] = ()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Every other file of the bundle: its `sha256` and `bytes`."""
    engines: Mapping[str, EngineRecord] = field(default_factory=dict)
    """By name: the last part of the engine's directory."""

    @property
    def dtype(self) -> str:
        """NumPy's name of the model's dtype."""
        return NAMES[self.options["dtype"]]

    @property
    def task(self) -> str:
        """What the graphs are for; "causal-lm" in bundles from before there was a choice."""
        return str(self.options.get("task", "causal-lm"))

    @property
    def max_length(self) -> int:
        """Most tokens a row may hold."""
        return int(self.options["max_length"])

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "tool": dict(self.tool),
            "libraries": dict(self.libraries),
            "checkpoint": dict(self.checkpoint),
            "facts": self.facts.to_json(),
            "options": dict(self.options),
            "layouts": {
                name: {
                    "file": layout.file,
                    "keep_window": layout.keep_window,
                    "notes": list(layout.notes),
                    "ort": layout.ort.to_json() if layout.ort is not None else None,
                    "signature": layout.signature.to_json(),
                }
                for name, layout in self.layouts.items()
            },
            "warnings": list(self.warnings),
            "files": {name: dict(entry) for name, entry in sorted(self.files.items())},
            "engines": {name: record.model_dump(mode="json") for name, record in sorted(self.engines.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises KeyError, TypeError or ValueError where `data` is not a manifest of this format version."""
        if data["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {data['format_version']!r}; this version reads {FORMAT_VERSION}")
        layouts = {
            name: Layout(
                row["file"],
                Signature.from_json(row["signature"]),
                row["keep_window"],
                tuple(row["notes"]),
                Lowered.from_json(row["ort"]) if row.get("ort") else None,
            )
            for name, row in data["layouts"].items()
        }
        return cls(
            data["tool"],
            data["libraries"],
            data["checkpoint"],
            DogeFacts.from_json(data["facts"]),
            data["options"],
            layouts,
            tuple(data["warnings"]),
            data["files"],
            _read_engines(data.get("engines", {})),
        )


def _read_engines(rows: Mapping[str, Any]) -> dict[str, EngineRecord]:
    if not rows:  # spares every command on a bundle without engines the import of pydantic
        return {}
    from doge_deploy.bundle.engine_record import EngineRecord

    return {name: EngineRecord.model_validate(row) for name, row in rows.items()}


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
        BrokenBundleError: not a bundle, or files missing or altered (all are named).
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory; give a bundle that `doge-deploy export` wrote")
    try:
        manifest = Manifest.from_json(json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BrokenBundleError(f"{path} has no {MANIFEST}: not a bundle of `doge-deploy export`") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrokenBundleError(f"{path / MANIFEST} cannot be read: {type(error).__name__}: {error}") from error
    problems = list(_file_problems(path, manifest, quick=check == "quick"))
    if problems:
        raise BrokenBundleError(f"{path}: {'; '.join(problems)}; export it again")
    return Bundle(path, manifest)


def _file_problems(path: Path, manifest: Manifest, *, quick: bool) -> Iterator[str]:
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != entry["bytes"]:
            yield f"{name} was altered ({file.stat().st_size} bytes, manifest says {entry['bytes']})"
        elif not (quick and entry["bytes"] > _QUICK_LIMIT_BYTES) and sha256_file(file) != entry["sha256"]:
            yield f"{name} was altered (its sha256 is not the manifest's)"


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_entries(directory: Path) -> dict[str, dict[str, Any]]:
    """`files` of a manifest: every file in `directory` but the manifest itself, and without engines."""
    return {file.name: file_entry(file) for file in sorted(directory.iterdir()) if _is_listed(file)}


def _is_listed(file: Path) -> bool:
    return file.is_file() and file.name != MANIFEST


def file_entry(file: Path) -> dict[str, Any]:
    """What a manifest says of one file."""
    return {"sha256": sha256_file(file), "bytes": file.stat().st_size}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, the same bytes for the same manifest. An older one is replaced in one step."""
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n"
    aside = directory / f".{MANIFEST}.partial"
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(directory / MANIFEST)
