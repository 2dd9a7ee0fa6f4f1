"""Exported legacy Doges against numbers of the original code, and through the same commands as any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from broken_checkpoints import legacy
from bundles import make_bundle
from golden_legacy import REVISIONS, TOLERANCE, Golden

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import find_checkpoint, open_checkpoint
from doge_deploy.cli.main import run_command
from doge_deploy.runtime.ort import OrtRunner, open_runner
from doge_deploy.verify.reference import Reference, ReferenceRows

LAYOUTS = ("static", "growing")

SWEEPS = {"dense-2025-02": pytest.mark.sweep}
"""Its checkpoint differs from that of `dense-2025-03` in names, of which tests/checkpoint takes care."""


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SWEEPS.get(name, ())) for name in REVISIONS])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def bundle(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("legacy") / golden.path.name
    return make_bundle(golden.path, path, kv_cache=LAYOUTS, logits="all")


@pytest.fixture(params=LAYOUTS)
def runner(bundle: Path, request: pytest.FixtureRequest) -> OrtRunner:
    return open_runner(open_bundle(bundle), request.param, threads=1)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("text", "abc")
def test_one_call(golden: Golden, runner: OrtRunner, text: str) -> None:
    ids = golden.ids(text)
    runner.reset(len(ids))
    assert_close(runner.run(ids), golden.tensors[f"{text}.logits"])


def test_prefill_and_decode(golden: Golden, runner: OrtRunner) -> None:
    ids = golden.ids("b")
    runner.reset(1)
    assert_close(runner.run(ids[:, : golden.prefill]), golden.tensors["b.prefill.logits"])
    steps = [runner.run(ids[:, i : i + 1]) for i in range(golden.prefill, ids.shape[1])]
    assert_close(np.concatenate(steps, axis=1), golden.tensors["b.decode.logits"])
    cache = runner.cache()
    for name, expected in golden.caches().items():
        assert np.abs(cache[name][0] - expected).max() <= TOLERANCE


def test_the_score_has_query_heads(bundle: Path) -> None:
    shapes = {spec.name: spec.shape for spec in open_bundle(bundle).layout("static").signature.inputs}
    assert shapes["past_key_values.0.score"] == ("batch_size", 4, 256, 1)
    assert shapes["past_key_values.0.value"] == ("batch_size", 2, 256, 16)


def test_inspect_names_the_revision(golden: Golden, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", str(bundle)]) == 0
    assert f"revision    {golden.revision} (legacy, original SmallDoge code" in capsys.readouterr().out
    assert open_bundle(bundle).manifest.facts.revision == golden.revision


def test_verify(golden: Golden, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    arguments = ["--reference", str(golden.path), "--greedy-steps", "24", "--json", str(report)]
    assert run_command(["verify", str(bundle), *arguments]) == 0
    assert f"the reference of legacy Doges ({golden.revision}) against itself" in capsys.readouterr().out
    result = json.loads(report.read_text())
    cases = {case["case"] for case in result["cases"]}
    # early 2025 drops no key, so there is no window to go beyond
    assert ("window K=w+1" in cases) == (golden.revision == "2025-08")
    assert not result["skipped"]


@pytest.mark.parametrize("golden", ["dense-2025-03"], indirect=True)
def test_early_2025_drops_no_key(golden: Golden, bundle: Path) -> None:
    """Its config has a window of 16, which its code did not use: beyond it the bundle still keeps all."""
    layout = open_bundle(bundle).layout("static")
    assert not layout.keep_window
    assert layout.notes == ("no top-k of the dynamic mask: a Doge of 2025-03 keeps every key",)
    assert json.loads((golden.path / "config.json").read_text())["keep_window_size"] == 16
    checkpoint = open_checkpoint(str(golden.path))
    windowed = replace(checkpoint, facts=replace(checkpoint.facts, keep_window_size=16))
    ids = np.random.default_rng(0).permutation(256)[None, :40]
    runner = open_runner(open_bundle(bundle), "static", threads=1)
    runner.reset(1)
    found = runner.run(ids)[0]
    (keeps_all,), _ = ReferenceRows(Reference(checkpoint, "float32"), 1, "right").run(ids, np.array([40]))
    (drops,), _ = ReferenceRows(Reference(windowed, "float32"), 1, "right").run(ids, np.array([40]))
    assert np.abs(found - keeps_all.numpy()).max() <= TOLERANCE
    assert np.abs(found - drops.numpy()).max() > 1


@pytest.mark.parametrize("golden", ["dense"], indirect=True)
@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=pytest.mark.sweep), "bf16"])
def test_low_precision(golden: Golden, dtype: str, tmp_path: Path) -> None:
    path = make_bundle(golden.path, tmp_path / "bundle", dtype=dtype, kv_cache=LAYOUTS)
    assert run_command(["verify", str(path), "--reference", str(golden.path), "--greedy-steps", "8"]) == 0


@pytest.fixture(scope="module")
def legacy_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """doge-tiny, tokenizer and all, with the tensors that a legacy Doge has (its text is nonsense)."""
    path = tmp_path_factory.mktemp("legacy-tiny") / "checkpoint"
    shutil.copytree(find_checkpoint("doge-tiny"), path)
    legacy(path)
    return path


def test_the_same_commands_as_for_any_other(
    legacy_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(tmp_path / "bundle")
    assert run_command(["export", str(legacy_tiny), "-o", bundle, "--kv-cache", "static", "--kv-cache", "growing"]) == 0
    assert run_command(["verify", bundle, "--reference", str(legacy_tiny), "--greedy-steps", "24"]) == 0
    capsys.readouterr()
    texts = []
    for layout in LAYOUTS:
        arguments = ["--prompt", "What is a list?", "--greedy", "--max-new-tokens", "12", "--layout", layout, "--quiet"]
        assert run_command(["generate", bundle, *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].strip()
    assert texts[0] == texts[1]


LETTERS = [chr(0x4E00 + token) for token in range(256)]
"""A letter for every token that the golden checkpoints know, so that a text shows its tokens."""


def letter_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize(
    ("golden", "layout"),
    [
        ("dense", "static"),
        pytest.param("dense", "growing", marks=pytest.mark.sweep),
        pytest.param("dense-2025-03", "static", marks=pytest.mark.sweep),
        ("dense-2025-03", "growing"),
    ],
    indirect=["golden"],
)
def test_generate_prints_the_greedy_text_of_the_reference(
    golden: Golden, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 tokens, in `dense` far beyond the window."""
    path, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    shutil.copytree(golden.path, path)
    letter_tokenizer().save(str(path / "tokenizer.json"))
    make_bundle(path, bundle, kv_cache=(layout,))
    prompt = [int(token) for token in golden.ids("a")[0]]
    rows = ReferenceRows(Reference(open_checkpoint(str(path)), "float32"), 1, "right")
    tokens, fed = [], prompt
    for _ in range(40):
        (logits,), _ = rows.run(np.array([fed]), np.array([len(fed)]))
        fed = [int(logits[-1].argmax())]
        tokens += fed
    text = "".join(LETTERS[token] for token in prompt)
    arguments = ["--prompt", text, "--greedy", "--max-new-tokens", "40", "--quiet"]
    assert run_command(["generate", str(bundle), *arguments]) == 0
    assert capsys.readouterr().out == "".join(LETTERS[token] for token in tokens) + "\n"
