"""What a device is: the section `device` of a file in export_configs/, and the files themselves.

Facts are read, never chosen; what to export and to build for the device stands in the sections `export` and `build`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from doge_deploy.diagnostics import join_findings, suggest
from doge_deploy.errors import UsageError
from doge_deploy.options.build import BuildOptions, load_build_options, parse_capability
from doge_deploy.options.export import ExportOptions, load_export_options
from doge_deploy.options.load import load_options, read_document

GIB = 1 << 30

_PACKAGE = Path(__file__).parent.parent

EnginePlatform = Literal["linux-x86_64", "linux-aarch64"]
"""What the vendors have libraries for, as `doge_deploy.devices.host.platform_name` calls it."""


class DeviceFacts(BaseModel):
    """A device. The description of a field says what is legal, and is quoted where a value is not."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["cpu", "jetson", "desktop", "datacenter"] = Field(
        "cpu", description="one of cpu, jetson, desktop, datacenter"
    )
    product: str = Field("", description="the product's name")
    platform: EnginePlatform | Literal["any"] = Field("any", description="one of linux-x86_64, linux-aarch64, any")
    compute_capability: str | None = Field(None, description="a compute capability such as 8.7, or null for no GPU")
    memory_gib: float | None = Field(None, gt=0, description="a number > 0, or null where it is not fixed")
    """Of the GPU; where `memory_shared`, of the whole device."""
    memory_shared: bool = Field(False, description="true or false")
    """CPU, GPU and operating system have one memory."""
    memory_reserved_gib: float = Field(0.0, ge=0, description="a number >= 0")
    """What the operating system and the driver hold before a model is loaded."""
    bandwidth_gb_per_s: float | None = Field(None, gt=0, description="a number > 0, or null where it is not fixed")
    """Of that memory, 10^9 bytes per second, the maker's figure."""
    fp16_tflops: float | None = Field(None, gt=0, description="a number > 0, or null where it is not known")
    """Dense matrix products in 16 bits with sums in float32, 10^12 operations per second, the maker's figure."""
    jetpack: str | None = Field(None, description='a version in quotes such as "6.2", or null')
    cuda: str | None = Field(None, description='a version in quotes such as "12.6", or null')
    tensorrt: str | None = Field(None, description='a version in quotes such as "10.3", or null where there is none')
    """The newest that the maker supports there."""
    tensorrt_rtx: str | None = Field(None, description='a version in quotes such as "1.7", or null where there is none')

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _normalise_capability(cls, value: Any) -> Any:
        """`8.7`, `"8.7"`, `sm_87` -> `"8.7"`."""
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return parse_capability(str(value))
        return value

    @field_validator("memory_gib", "memory_reserved_gib", "bandwidth_gb_per_s", "fp16_tflops", mode="before")
    @classmethod
    def _whole_numbers_are_numbers(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def usable_bytes(self) -> int | None:
        """Memory that a model may take."""
        if self.memory_gib is None:
            return None
        return int((self.memory_gib - self.memory_reserved_gib) * GIB)

    def contradictions(self) -> list[str]:
        """What the facts say against each other, or leave open."""
        findings = [] if self.product else ["product is missing: must be the product's name"]
        if self.kind == "cpu":
            gpu = ("compute_capability", "jetpack", "cuda", "tensorrt", "tensorrt_rtx")
            findings += [f"{name}={getattr(self, name)!r}: a cpu has none" for name in gpu if getattr(self, name)]
            return findings
        needed = ("compute_capability", "memory_gib", "bandwidth_gb_per_s", "cuda")
        findings += [
            f"{name} is missing: must be {DeviceFacts.model_fields[name].description}"
            for name in needed
            if getattr(self, name) is None
        ]
        if (self.kind == "jetson") != (self.jetpack is not None):
            findings.append(f"kind={self.kind!r} with jetpack={self.jetpack!r}: a jetson has one, nothing else has")
        if self.memory_gib is not None and self.memory_reserved_gib >= self.memory_gib:
            findings.append(f"memory_reserved_gib={self.memory_reserved_gib}: must be less than memory_gib")
        return findings


@dataclass(frozen=True)
class DeviceConfig:
    """A file of export_configs/ that describes a device."""

    name: str
    description: str
    sources: tuple[str, ...]
    facts: DeviceFacts
    export: ExportOptions
    build: BuildOptions | None
    """None: no engine is built for it."""


def load_device_config(path: Path) -> DeviceConfig:
    """One file, with its sections `device`, `export` and, where an engine is built, `build`.

    Raises:
        UsageError: it cannot be read, or says what is not legal, contradictory or without a source.
    """
    document = read_document(path)
    facts = load_options(DeviceFacts, "device", path, {}, [])
    name, sources = document.get("name"), document.get("sources")
    findings = [f"device: {finding}" for finding in facts.contradictions()]
    if name != path.stem:
        findings.append(f"name={name!r}: must be {path.stem!r}, the name of the file")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, str) for source in sources):
        findings.append(f"sources={sources!r}: must be a list of places that the facts were taken from")
    if findings:
        raise UsageError(f"{path}: {join_findings(findings)}")
    return DeviceConfig(
        name=path.stem,
        description=str(document.get("description", "")),
        sources=tuple(sources or ()),
        facts=facts,
        export=load_export_options(path, {}, []),
        build=load_build_options(path, {}, []) if "build" in document else None,
    )


def config_folder() -> Path:
    """The folder export_configs/ of a clone, or its copy in an installed package.

    Raises:
        UsageError: neither is there.
    """
    for folder in (_PACKAGE / "export_configs", _PACKAGE.parent / "export_configs"):
        if folder.is_dir():
            return folder
    raise UsageError("export_configs/ is missing from this installation; install doge-deploy again")


def device_configs() -> dict[str, DeviceConfig]:
    """The devices of export_configs/ by name."""
    found = {}
    for path in sorted(config_folder().glob("*.yaml")):
        if "device" in read_document(path):
            found[path.stem] = load_device_config(path)
    return found


def find_devices(asked: str, known: Sequence[str]) -> list[str]:
    """The devices that `asked` means: the one of that name, or all whose name has its words in that order.

    `jetson-orin-jp6` means `jetson-orin-nano-8gb-jp6`, `jetson` all of them.

    Raises:
        UsageError: there is none.
    """
    if asked in known:
        return [asked]
    words = asked.lower().split("-")
    found = [name for name in known if _in_order(words, name.split("-"))]
    if not found:
        raise UsageError(f"no device {asked!r}{suggest(asked, known)}; known: {', '.join(known)}, or a YAML file")
    return found


def _in_order(words: Sequence[str], all_words: Sequence[str]) -> bool:
    rest = iter(all_words)
    return all(word in rest for word in words)
