"""What a device can do with a model: the backend, the lowering, the dtype, and the reason where it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.config.revisions import REVISIONS
from doge_deploy.devices.facts import DeviceFacts, device_configs
from doge_deploy.doctor.deployment_options import DeploymentOption, deployment_options, size
from doge_deploy.doctor.model import open_model
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.graph.weight_formats import format_of
from doge_deploy.options.build import BuildOptions
from doge_deploy.options.export import ExportOptions
from doge_deploy.targets.deployment import Constraints, DeployableModel
from doge_deploy.targets.trt.choices import check_model

DEVICES = {name: config.facts for name, config in device_configs().items()}
TINY = open_model("doge-tiny")
BIG = DeployableModel(
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


def option(
    device: str | DeviceFacts, backend: str, model: DeployableModel | None = None, **constraints: Any
) -> DeploymentOption:
    facts = DEVICES[device] if isinstance(device, str) else device
    return next(one for one in deployment_options(facts, model, Constraints(**constraints)) if one.backend == backend)


CPU = DeviceFacts(kind="cpu", product="a processor", bandwidth_gb_per_s=50.0)

USABLE = {
    "cpu": ["ort"],
    "rtx-desktop": ["cuda", "trt", "trt-rtx", "ort"],
    "rtx-4090": ["cuda", "trt", "trt-rtx", "ort"],
    "h100": ["cuda", "trt", "ort"],
    "jetson-orin-nano-8gb-jp6": ["ort"],
    "jetson-orin-nano-8gb-jp7": ["trt", "ort"],
    "jetson-agx-orin-jp7": ["trt", "ort"],
    "jetson-agx-thor": ["trt", "ort"],
}


def test_every_device_has_an_answer() -> None:
    assert set(USABLE) == set(DEVICES)


@pytest.mark.parametrize("name", USABLE)
def test_usable_backends_come_first(name: str) -> None:
    found = deployment_options(DEVICES[name], TINY)
    assert [one.backend for one in found if one.usable] == USABLE[name]
    assert [one.backend for one in found][: len(USABLE[name])] == USABLE[name]
    assert all(one.remedy for one in found if not one.usable)


def test_jetpack_6_is_answered_with_jetpack_7() -> None:
    found = option("jetson-orin-nano-8gb-jp6", "trt")
    assert "TensorRT 10.3 lacks layers" in found.reason and found.remedy == "install JetPack 7.2 or later"


def test_tensorrt_rtx_has_no_code_for_orin_and_thor() -> None:
    for name in ("jetson-agx-orin-jp7", "jetson-agx-thor"):
        assert "TensorRT-RTX compiles for compute capability 7.5" in option(name, "trt-rtx").reason


@pytest.mark.parametrize(
    ("name", "backend", "constraints", "lowering"),
    [
        ("h100", "trt", {}, "plugins"),
        ("h100", "trt", {"plugins": False}, "standard"),
        ("rtx-desktop", "trt-rtx", {}, "standard"),
        ("rtx-desktop", "ort", {}, "cpu"),
    ],
)
def test_lowering(name: str, backend: str, constraints: dict[str, Any], lowering: str) -> None:
    assert option(name, backend, **constraints).lowering == lowering


def test_dtype_is_the_bundles_or_the_one_asked_for_or_the_backends() -> None:
    assert option("h100", "trt", replace(TINY, dtype="fp32"), dtype="bf16").dtype == "fp32"
    assert option("h100", "trt", TINY, dtype="bf16").dtype == "bf16"
    assert (option("h100", "trt", TINY, engine_dtype="bf16").dtype, option("h100", "ort", TINY).dtype) == (
        "bf16",
        "fp32",
    )


def test_turing_has_no_bf16() -> None:
    turing = DEVICES["rtx-desktop"].model_copy(update={"compute_capability": "7.5"})
    assert option(turing, "trt-rtx", TINY, dtype="bf16").reason == "compute capability 7.5 has no bf16"
    assert option(turing, "trt-rtx", TINY).usable


def test_a_window_beyond_topk_needs_plugins_where_no_cache_of_the_window_can_be_built() -> None:
    wide = replace(TINY, facts=replace(TINY.facts, keep_window_size=4096), max_length=8192)
    assert option("h100", "trt", wide).usable and option("h100", "trt", wide, plugins=False).usable
    wide = replace(wide, facts=replace(wide.facts, sliding_window=8000))
    found = option("h100", "trt", wide, plugins=False)
    assert "keep_window_size 4096 is more than TensorRT's TopK takes (3840)" in found.reason
    assert "--max-length 4096" in found.remedy
    assert option("h100", "trt", replace(wide, max_length=4096), plugins=False).usable, "nothing is selected there"


def test_an_engine_is_built_from_the_static_layout() -> None:
    growing = replace(TINY, layouts=("growing",))
    assert "has no static layout" in option("h100", "trt", growing).reason and option("h100", "ort", growing).usable
    classifier = replace(TINY, layouts=("uncached",))
    assert "has no cache" in option("h100", "trt", classifier).reason and option("h100", "ort", classifier).usable


def test_what_runs_may_still_be_too_large_to_build_on_the_device() -> None:
    found = option("jetson-orin-nano-8gb-jp7", "trt", BIG)
    assert found.needs and found.needs.total_bytes < 6 << 30
    assert found.reason.startswith("fits, but its build may take") and "compute capability 8.7" in found.remedy
    assert option("jetson-agx-orin-jp7", "trt", BIG).usable
    assert option("rtx-desktop", "trt-rtx", BIG).build_bytes is None, "built anywhere"


def test_what_does_not_fit_says_by_how_much() -> None:
    found = option("jetson-orin-nano-8gb-jp7", "trt", BIG, batch_size=16)
    assert found.needs and found.reason == f"needs {size(found.needs.total_bytes)} of memory; 6.00 GiB are free for it"


def test_memory_of_a_graphics_card_says_nothing_about_the_processors() -> None:
    huge = replace(BIG, max_length=1 << 20, inlined=True)  # a slot for each token
    assert not option("rtx-desktop", "trt-rtx", huge).usable
    assert option("rtx-desktop", "ort", huge).usable and option("rtx-desktop", "ort", huge).tokens_per_second is None


def test_bandwidth_bounds_the_speed() -> None:
    one, eight = (option("h100", "trt", TINY, batch_size=rows).tokens_per_second for rows in (1, 8))
    assert one and eight and one < eight < 8 * one


def test_a_bundle_says_what_it_is(tiny_bundle: Path) -> None:
    model = open_model(str(tiny_bundle))
    assert (model.dtype, model.layouts, model.last_logits) == ("fp32", ("static", "growing"), False)
    with pytest.raises(UsageError, match="was exported for 512; export it again"):
        open_model(str(tiny_bundle), max_length=64)


INT4 = format_of(ExportOptions(quantize="int4"))


@pytest.mark.parametrize("backend", ["trt", "trt-rtx"])
def test_an_engine_that_build_refuses_is_no_option(backend: str, tmp_path: Path) -> None:
    path = make_bundle("doge-tiny", tmp_path / "b", quantize="int4", max_length=32)
    found = option("rtx-desktop", backend, open_model(str(path)))
    assert found.reason == f"stores its weights as int4 of an fp32 graph, which {backend} does not take"
    assert found.remedy == "export with --dtype fp16 or bf16"
    bundle = open_bundle(path)
    with pytest.raises(UnsupportedModelError, match=f"{found.reason}; {found.remedy}"):
        check_model(bundle, BuildOptions(target=backend))
    served = option("rtx-desktop", "ort", open_model(str(path)))
    assert served.usable and served.needs
    plain = option("rtx-desktop", "ort", replace(TINY, max_length=32)).needs
    assert plain and served.needs.weight_bytes < plain.weight_bytes / 4


def test_a_device_without_such_numbers(tmp_path: Path) -> None:
    model = open_model(str(make_bundle("doge-tiny", tmp_path / "b", quantize="nvfp4", dtype="fp16", max_length=32)))
    older, newer = option("rtx-4090", "trt-rtx", model), option("rtx-4090", "ort", model)
    assert older.reason == "engines of nvfp4 weights need compute capability 12.0; this is 8.9"
    assert older.remedy == "export with --quantize int4 --dtype fp16"
    assert newer.usable


def test_plugins_take_no_expert_tables_of_few_bits(tmp_path: Path) -> None:
    path = make_bundle("doge-tiny-moe", tmp_path / "b", quantize="int4", dtype="fp16", max_length=32)
    check_model(open_bundle(path), BuildOptions(target="trt", plugins=False))
    check_model(open_bundle(path), BuildOptions(target="trt-rtx"))
    with pytest.raises(UnsupportedModelError, match="the plugins take them in float16; build with --no-plugins"):
        check_model(open_bundle(path), BuildOptions(target="trt"))
    dense = make_bundle("doge-tiny", tmp_path / "c", quantize="int4", dtype="fp16", max_length=32)
    check_model(open_bundle(dense), BuildOptions(target="trt"))


NOT_FOR_PLUGINS = {
    "head-size": ({"head_dim": 260}, "D a multiple of 8, at most 256"),
    "sliding-window": ({"sliding_window": 100, "keep_window_size": 64}, "sliding_window=100"),
    "query-heads": ({"num_attention_heads": 34, "num_key_value_heads": 2}, "at most 16 query heads"),
}


@pytest.mark.parametrize(("changes", "words"), NOT_FOR_PLUGINS.values(), ids=NOT_FOR_PLUGINS.keys())
def test_what_the_plugins_do_not_take_is_no_option(changes: dict[str, Any], words: str) -> None:
    model = replace(TINY, facts=replace(TINY.facts, **changes))
    found = option("h100", "trt", model)
    assert found.lowering == "plugins" and words in found.reason
    assert found.remedy == "build with --no-plugins, or use ort"
    assert option("h100", "trt", model, plugins=False).usable


def test_experts_that_the_plugins_do_not_take() -> None:
    facts = open_checkpoint("doge-tiny-moe").facts
    model = replace(TINY, facts=facts)
    assert option("h100", "trt", model).usable
    trained = replace(model, facts=replace(facts, hidden_act="prelu"))
    assert "activation='prelu'" in option("h100", "trt", trained).reason
    many = replace(model, facts=replace(facts, num_experts=4096, num_experts_per_tok=200))
    assert "num_experts_per_tok between 1 and" in option("h100", "trt", many).reason


def speed(model: DeployableModel, **constraints: Any) -> float:
    found = option("h100", "trt", model, **constraints).tokens_per_second
    assert found is not None
    return found


def test_no_window_makes_the_bound_too_low() -> None:
    """Keys beyond the window need not be read: a longer text decodes as fast."""
    window = TINY.facts.keep_window_size
    long, longer = (speed(replace(TINY, max_length=length)) for length in (2 * window, 8 * window))
    assert long == longer < speed(replace(TINY, max_length=window // 2))


def test_no_batch_of_a_mixture_makes_the_bound_too_low() -> None:
    """All rows may choose the same experts: weights count once, so that only caches grow with the rows."""
    one, eight = (speed(replace(BIG, max_length=1), batch_size=rows) for rows in (1, 8))
    assert 7.9 < eight / one < 8


def test_weights_of_a_format_raise_the_bound() -> None:
    assert speed(replace(TINY, weight_format=None)) > 0
    stored = replace(TINY, dtype="fp32", weight_format=INT4)
    found, plain = (option(CPU, "ort", one) for one in (stored, replace(TINY, dtype="fp32")))
    assert found.tokens_per_second and plain.tokens_per_second
    assert found.tokens_per_second > 2 * plain.tokens_per_second


def test_a_legacy_doge_reads_a_score_per_query_head() -> None:
    revision = next(name for name, found in REVISIONS.items() if found.score_per_query_head)
    assert speed(replace(TINY, facts=replace(TINY.facts, revision=revision))) < speed(TINY)


STEADY = {"rope_type": "default", "rope_theta": 10000.0}
"""Angles that never change."""
WINDOWED = replace(TINY, facts=replace(TINY.facts, keep_window_size=2048, rope=STEADY), max_length=4096)


@pytest.mark.parametrize("backend", ["trt", "trt-rtx"])
def test_an_engine_holds_the_window_whatever_the_length(backend: str) -> None:
    """But for the tables of angles: 2 networks, D/2 cosines and sines a token."""
    found = [
        option(
            "h100" if backend == "trt" else "rtx-desktop", backend, replace(WINDOWED, max_length=length), plugins=False
        )
        for length in (4096, 32768, 131072)
    ]
    short, _, long = (one.needs for one in found)
    assert short and long and long.cache_bytes == short.cache_bytes and long.activation_bytes == short.activation_bytes
    assert long.weight_bytes - short.weight_bytes == 2 * (131072 - 4096) * TINY.facts.head_dim * 2
    whole = option("rtx-desktop", "ort", WINDOWED).needs
    assert whole and short.cache_bytes < whole.cache_bytes, "twice the window, in fp16"


def test_what_makes_the_cache_of_an_engine_hold_the_text() -> None:
    bounded = option("h100", "trt", WINDOWED, plugins=False).needs
    with_plugins = option("h100", "trt", WINDOWED).needs
    inlined = option("h100", "trt", replace(WINDOWED, inlined=True), plugins=False).needs
    fits = option("h100", "trt", replace(WINDOWED, max_length=2048), plugins=False).needs
    assert bounded and with_plugins and inlined and fits
    assert with_plugins == inlined != bounded
    assert 2 * fits.cache_bytes < bounded.cache_bytes, (
        "a cache that is given beside the one that is read, with positions"
    )


def test_calls_that_stay_whole_take_more() -> None:
    facts = replace(open_checkpoint("doge-tiny-moe").facts, keep_window_size=2048, rope=STEADY)
    mixed = replace(TINY, facts=facts, max_length=4096)
    whole, cut = (
        option("h100", "trt", replace(mixed, routing=one), plugins=False).needs for one in ("reference", "per-token")
    )
    assert whole and cut and whole.activation_bytes > 3 * cut.activation_bytes and whole.cache_bytes == cut.cache_bytes


def test_a_classifier_generates_nothing() -> None:
    assert option("jetson-agx-thor", "ort", replace(TINY, layouts=("uncached",))).tokens_per_second is None


def test_sizes_are_written_for_people() -> None:
    assert [size(n) for n in (1 << 20, 340 << 20, 5 << 28)] == ["1.0 MiB", "340 MiB", "1.25 GiB"]
