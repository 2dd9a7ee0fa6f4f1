"""What a device can do with a model: the backend, the lowering, the dtype, and the reason where it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.devices.facts import DeviceFacts, device_configs
from doge_deploy.doctor.deployment_options import Way, Wish, size, ways
from doge_deploy.doctor.model import Subject, open_subject
from doge_deploy.errors import UsageError

DEVICES = {name: config.facts for name, config in device_configs().items()}
TINY = open_subject("doge-tiny")
BIG = Subject(
    "1.4B-MoE",
    replace(
        open_checkpoint("doge-tiny-moe").facts,
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=16384,
        num_experts_per_tok=64,
    ),
    None,
    2048,
    ("static", "growing"),
    True,
)
"""The largest published size, by its facts alone."""


def way(device: str | DeviceFacts, backend: str, subject: Subject | None = None, **wish: Any) -> Way:
    facts = DEVICES[device] if isinstance(device, str) else device
    return next(one for one in ways(facts, subject, Wish(**wish)) if one.backend == backend)


USABLE = {
    "cpu": ["ort"],
    "rtx-desktop": ["trt", "trt-rtx", "ort"],
    "rtx-4090": ["trt", "trt-rtx", "ort"],
    "h100": ["trt", "ort"],
    "jetson-orin-nano-8gb-jp6": ["ort"],
    "jetson-orin-nano-8gb-jp7": ["trt", "ort"],
    "jetson-agx-orin-jp7": ["trt", "ort"],
    "jetson-agx-thor": ["trt", "ort"],
}


def test_every_device_has_an_answer() -> None:
    assert set(USABLE) == set(DEVICES)


@pytest.mark.parametrize("name", USABLE)
def test_usable_backends_come_first(name: str) -> None:
    found = ways(DEVICES[name], TINY)
    assert [one.backend for one in found if one.usable] == USABLE[name]
    assert [one.backend for one in found][: len(USABLE[name])] == USABLE[name]
    assert all(one.remedy for one in found if not one.usable)


def test_jetpack_6_is_answered_with_jetpack_7() -> None:
    found = way("jetson-orin-nano-8gb-jp6", "trt")
    assert "TensorRT 10.3 lacks layers" in found.reason and found.remedy == "install JetPack 7.2 or later"


def test_tensorrt_rtx_has_no_code_for_orin_and_thor() -> None:
    for name in ("jetson-agx-orin-jp7", "jetson-agx-thor"):
        assert "TensorRT-RTX compiles for compute capability 7.5" in way(name, "trt-rtx").reason


@pytest.mark.parametrize(
    ("name", "backend", "wish", "lowering"),
    [
        ("h100", "trt", {}, "plugins"),
        ("h100", "trt", {"plugins": False}, "standard"),
        ("rtx-desktop", "trt-rtx", {}, "standard"),
        ("rtx-desktop", "ort", {}, "cpu"),
    ],
)
def test_lowering(name: str, backend: str, wish: dict[str, Any], lowering: str) -> None:
    assert way(name, backend, **wish).lowering == lowering


def test_dtype_is_the_bundles_or_the_one_asked_for_or_the_backends() -> None:
    assert way("h100", "trt", replace(TINY, dtype="fp32"), dtype="bf16").dtype == "fp32"
    assert way("h100", "trt", TINY, dtype="bf16").dtype == "bf16"
    assert (way("h100", "trt", TINY, engine_dtype="bf16").dtype, way("h100", "ort", TINY).dtype) == ("bf16", "fp32")


def test_turing_has_no_bf16() -> None:
    turing = DEVICES["rtx-desktop"].model_copy(update={"compute_capability": "7.5"})
    assert way(turing, "trt-rtx", TINY, dtype="bf16").reason == "compute capability 7.5 has no bf16"
    assert way(turing, "trt-rtx", TINY).usable


def test_a_window_beyond_topk_needs_plugins() -> None:
    wide = replace(TINY, facts=replace(TINY.facts, keep_window_size=4096), max_length=8192)
    assert way("h100", "trt", wide).usable
    found = way("h100", "trt", wide, plugins=False)
    assert "keep_window_size 4096 is more than TensorRT's TopK takes (3840)" in found.reason
    assert "--max-length 4096" in found.remedy
    assert way("h100", "trt", replace(wide, max_length=4096), plugins=False).usable, "nothing is selected there"


def test_an_engine_is_built_from_the_static_layout() -> None:
    growing = replace(TINY, layouts=("growing",))
    assert "has no static layout" in way("h100", "trt", growing).reason and way("h100", "ort", growing).usable
    classifier = replace(TINY, layouts=("uncached",))
    assert "has no cache" in way("h100", "trt", classifier).reason and way("h100", "ort", classifier).usable


def test_what_runs_may_still_be_too_large_to_build_on_the_device() -> None:
    found = way("jetson-orin-nano-8gb-jp7", "trt", BIG)
    assert found.needs and found.needs.total_bytes < 6 << 30
    assert found.reason.startswith("fits, but its build may take") and "compute capability 8.7" in found.remedy
    assert way("jetson-agx-orin-jp7", "trt", BIG).usable
    assert way("rtx-desktop", "trt-rtx", BIG).build_bytes is None, "built anywhere"


def test_what_does_not_fit_says_by_how_much() -> None:
    found = way("jetson-orin-nano-8gb-jp7", "trt", BIG, batch_size=16)
    assert found.needs and found.reason == f"needs {size(found.needs.total_bytes)} of memory; 6.00 GiB are free for it"


def test_memory_of_a_graphics_card_says_nothing_about_the_processors() -> None:
    huge = replace(BIG, max_length=1 << 20)
    assert not way("rtx-desktop", "trt-rtx", huge).usable
    assert way("rtx-desktop", "ort", huge).usable and way("rtx-desktop", "ort", huge).tokens_per_second is None


def test_bandwidth_bounds_the_speed() -> None:
    one, eight = (way("h100", "trt", TINY, batch_size=rows).tokens_per_second for rows in (1, 8))
    assert one and eight and one < eight < 8 * one


def test_a_bundle_says_what_it_is(tiny_bundle: Path) -> None:
    subject = open_subject(str(tiny_bundle))
    assert (subject.dtype, subject.layouts, subject.last_logits) == ("fp32", ("static", "growing"), False)
    with pytest.raises(UsageError, match="was exported for 512; export it again"):
        open_subject(str(tiny_bundle), max_length=64)


def test_sizes_are_written_for_people() -> None:
    assert [size(n) for n in (1 << 20, 340 << 20, 5 << 28)] == ["1.0 MiB", "340 MiB", "1.25 GiB"]
