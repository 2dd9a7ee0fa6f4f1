"""manifest.json, format version 2: what a bundle says about itself. The annotations are the schema.

manifest.json          what it is, where it came from, the hash of every other file
model.onnx             the graph of the first layout; model.<layout>.onnx of a second one
model.ort.onnx         the first graph lowered for ONNX Runtime's CPU provider, where that applies
weights.safetensors    every weight once, external data of the graphs
calibration.json       the tokens of the text that numbers of 4 bits were chosen on, where they were
config.json, generation_config.json, tokenizer files: as they were in the checkpoint
engines/<name>/        an engine that `doge-deploy build` made of the static graph, and what was found about it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict

from doge_deploy.bundle.files import FileEntry, FileName, Sha256
from doge_deploy.bundle.signature import Signature
from doge_deploy.bundle.typed_json import Check
from doge_deploy.config.model import DogeFacts
from doge_deploy.dtypes import NAMES
from doge_deploy.options.resolved import ResolvedOptions

if TYPE_CHECKING:
    from doge_deploy.bundle.engine_record import EngineRecord
else:
    EngineRecord = Any  # made with pydantic, which is loaded only where there are engines: see consistency.py

FORMAT_VERSION = 2

LayoutName = Literal["static", "growing", "uncached"]


@dataclass(frozen=True)
class Lowered:
    """What a backend's lowering made of a layout's graph."""

    file: FileName | None
    """The lowered graph; None where no pass applied."""
    applied: tuple[str, ...] = ()
    """Passes that changed the graph, in order."""
    declined: Mapping[str, str] = field(default_factory=dict)
    """Passes that did not apply, each with the reason."""
    requires: str = ""
    """The oldest runtime that runs the file, where not every one that runs bundles does."""
    drops_keys: bool = False
    """The graph has the signature of `bundle.signature.windowed`: its runner drops keys that left the window."""
    shares_buffers: bool = False
    """Past and present of a growing graph may be the same buffers, see `bundle.signature.SHARES_BUFFERS`."""

    long_calls: FileName | None = None
    """The same for calls of many tokens, on processors without an instruction for sums of products of bytes; None where
    it would be no other graph."""

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "applied": list(self.applied),
            "declined": dict(self.declined),
            "requires": self.requires,
            "drops_keys": self.drops_keys,
            "shares_buffers": self.shares_buffers,
            "long_calls": self.long_calls,
        }


@dataclass(frozen=True)
class Layout:
    """One graph of the bundle."""

    file: FileName
    signature: Signature
    keep_window: bool
    """Whether the body of DynamicMaskAttention selects the best `keep_window_size` keys."""
    notes: tuple[str, ...] = ()
    lowered: Mapping[str, Lowered] = field(default_factory=dict)
    """By name of the backend: its own form of the graph. A backend that lowers nothing at export is not in it."""

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "keep_window": self.keep_window,
            "notes": list(self.notes),
            "lowered": {name: lowered.to_json() for name, lowered in self.lowered.items()},
            "signature": self.signature.to_json(),
        }


class Tool(TypedDict):
    """What wrote a bundle."""

    name: str
    version: str


class Adapter(TypedDict):
    """A LoRA adapter that was merged."""

    sha256: Sha256
    source: str | None
    """A Hub id; None for a directory."""


class Source(TypedDict):
    """Where a bundle came from."""

    sha256: Sha256
    """Of the weights, however they are sharded."""
    source: str | None
    """A bundled name or a Hub id; None for a directory."""
    adapter: NotRequired[Adapter]


@dataclass(frozen=True)
class Manifest:
    """What a bundle is."""

    tool: Tool
    libraries: Mapping[str, str]
    checkpoint: Source
    facts: DogeFacts
    options: ResolvedOptions
    layouts: Annotated[
        Mapping[str, Layout], Check("an object of at least one layout", lambda layouts: len(layouts) > 0)
    ]
    """By name, see `LayoutName`."""
    warnings: tuple[str, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    """Every other file of the bundle."""
    engines: Mapping[str, EngineRecord] = field(default_factory=dict)
    """By name: the last part of the engine's directory."""

    @property
    def dtype(self) -> str:
        """NumPy's name of the model's dtype."""
        return NAMES[self.options.dtype]

    @property
    def task(self) -> str:
        """What the graphs are for."""
        return self.options.task

    @property
    def max_length(self) -> int:
        """Most tokens a row may hold."""
        return self.options.max_length

    @property
    def last_logits(self) -> bool:
        """Whether a call gives logits of each row's last token alone."""
        return self.options.logits == "last"

    @property
    def routing_mixes(self) -> bool:
        """Whether experts are routed as transformers does it, which mixes the tokens of a call and of all its rows."""
        return self.facts.is_moe and self.options.routing == "reference"

    @property
    def whole_calls(self) -> str:
        """Why what a token gets depends on the tokens that come in the same call; empty where it does not, so that a
        text may be cut into calls anyhow.
        """
        if self.routing_mixes:
            return "routing=reference mixes the tokens of a call"
        if self.facts.rope_changes(self.max_length):
            return "its angles depend on the longest text of a call"
        return ""

    def to_json(self) -> dict[str, Any]:
        """The document, in the order of its keys."""
        return {
            "format_version": FORMAT_VERSION,
            "tool": dict(self.tool),
            "libraries": dict(self.libraries),
            "checkpoint": dict(self.checkpoint),
            "facts": self.facts.to_json(),
            "options": self.options.to_json(),
            "layouts": {name: layout.to_json() for name, layout in self.layouts.items()},
            "warnings": list(self.warnings),
            "files": {name: dict(entry) for name, entry in sorted(self.files.items())},
            "engines": {name: record.model_dump(mode="json") for name, record in sorted(self.engines.items())},
        }
