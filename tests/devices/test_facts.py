"""Device facts: every file of export_configs/ that has them, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from doge_deploy.devices.facts import GIB, DeviceConfig, config_folder, device_configs, find_devices, load_device_config
from doge_deploy.devices.tensorrt_limits import (
    RTX_CAPABILITIES,
    TRT_FIRST_CAPABILITY,
    supports_dtype,
)
from doge_deploy.devices.versions import at_least
from doge_deploy.errors import UsageError

DEVICES = device_configs()

REQUIRED = {"rtx-desktop", "jetson-orin-nano-8gb-jp6", "jetson-agx-orin-jp7", "jetson-agx-thor", "h100", "cpu"}


def test_the_devices_that_were_promised_are_there() -> None:
    assert set(DEVICES) >= REQUIRED


@pytest.fixture(params=DEVICES.values(), ids=DEVICES.keys())
def device(request: pytest.FixtureRequest) -> DeviceConfig:
    found: DeviceConfig = request.param
    return found


def test_facts_are_whole_and_have_a_source(device: DeviceConfig) -> None:
    assert device.facts.contradictions() == []
    stated = " ".join(source.split(": ")[0] for source in device.sources)
    for fact in ("compute_capability", "memory_gib", "bandwidth_gb_per_s", "jetpack", "cuda", "tensorrt"):
        assert getattr(device.facts, fact) is None or fact in stated, f"{fact} has no source"


def test_what_is_exported_and_built_runs_on_the_device(device: DeviceConfig) -> None:
    capability = device.facts.compute_capability
    if device.build is None:
        return
    assert capability is not None and capability in device.build.compute_capabilities
    assert supports_dtype(capability, device.export.dtype)
    assert "static" in device.export.kv_cache, "engines are built from the static layout"
    if device.build.target == "trt-rtx":
        assert set(device.build.compute_capabilities) <= set(RTX_CAPABILITIES) and device.facts.tensorrt_rtx
    else:
        assert at_least(capability, TRT_FIRST_CAPABILITY) and device.facts.tensorrt


def test_tensorrt_rtx_is_stated_where_it_compiles_for_the_device(device: DeviceConfig) -> None:
    compiles = device.facts.compute_capability in RTX_CAPABILITIES
    assert compiles == (device.facts.tensorrt_rtx is not None)


@pytest.mark.tensorrt
def test_capabilities_are_those_of_the_installed_tensorrt_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    known = {name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert known == {capability.replace(".", "") for capability in RTX_CAPABILITIES}


def test_memory_for_a_model_is_what_the_system_leaves() -> None:
    assert DEVICES["jetson-orin-nano-8gb-jp6"].facts.usable_bytes == 6 * GIB
    assert DEVICES["cpu"].facts.usable_bytes is None


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("h100", ["h100"]),
        ("cpu", ["cpu"]),
        ("jetson-orin-jp6", ["jetson-orin-nano-8gb-jp6"]),
        ("thor", ["jetson-agx-thor"]),
        ("Orin-JP7", ["jetson-agx-orin-jp7", "jetson-orin-nano-8gb-jp7"]),
    ],
)
def test_a_device_may_be_named_by_some_of_its_words(asked: str, found: list[str]) -> None:
    assert sorted(find_devices(asked, list(DEVICES))) == found


def test_an_unknown_device_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no device 'jetson-tor' .*known: cpu, h100"):
        find_devices("jetson-tor", list(DEVICES))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"sources": []}, "sources=[]: must be a list of places"),
    "another name": ({"name": "jetson"}, "name='jetson': must be 'h100', the name of the file"),
    "no memory": ({"memory_gib": None}, "device: memory_gib is missing: must be a number > 0"),
    "no product": ({"product": ""}, "device: product is missing"),
    "negative memory": ({"memory_gib": -1}, "memory_gib=-1: must be a number > 0"),
    "word for a capability": ({"compute_capability": "hopper"}, "must be a compute capability such as 8.7"),
    "version as a number": ({"cuda": 13.0}, 'cuda=13.0: must be a version in quotes such as "12.6"'),
    "JetPack of no Jetson": ({"jetpack": "6.2"}, "kind='datacenter' with jetpack='6.2'"),
    "cpu with a GPU": ({"kind": "cpu"}, "compute_capability='9.0': a cpu has none"),
    "all memory reserved": ({"memory_reserved_gib": 80}, "memory_reserved_gib=80.0: must be less than memory_gib"),
    "misspelt": ({"memory": 80}, "unknown key 'memory' (did you mean 'memory_gib'?)"),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD.keys())
def test_bad_facts(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    document = yaml.safe_load((config_folder() / "h100.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        (document if key in ("name", "sources") else document["device"])[key] = value
    path = tmp_path / "h100.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_device_config(path)
    assert words in str(caught.value)
