"""Tensors by other names: a tied head alone, a wrapper's prefixes, an index with `./`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_checkpoints import HEAD, INDEX, WEIGHTS, early, legacy
from bundles import NoProgress
from random_doge import save_random_doge
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DogeModel

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.options.export import ExportOptions
from doge_deploy.pipelines.export import export
from doge_deploy.verify.run import verify

Rename = Callable[[str], str]


def renamed(path: Path, rename: Rename) -> Path:
    tensors = {rename(name): tensor for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path


@pytest.fixture
def copy(dense_doge: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense_doge, tmp_path / "checkpoint"))


def inside_layers(part: str) -> Rename:
    """FSDP and activation checkpointing wrap every layer."""

    def rename(name: str) -> str:
        head, found, tail = name.partition("model.layers.")
        number, _, rest = tail.partition(".")
        return f"{head}{found}{number}.{part}.{rest}" if found else name

    return rename


WRAPPED: dict[str, tuple[Rename, str]] = {
    "DistributedDataParallel": (lambda name: f"module.{name}", "'module.'"),
    "torch.compile": (lambda name: f"_orig_mod.{name}", "'_orig_mod.'"),
    "both": (lambda name: f"module._orig_mod.{name}", "'module.', '_orig_mod.'"),
    "peft": (lambda name: f"base_model.model.{name}", "'base_model.model.'"),
    "Lightning": (lambda name: f"model.{name}", "'model.'"),
    "a trainer's own": (lambda name: f"policy.net.{name}", "'policy.net.'"),
    "FSDP": (
        lambda name: f"_fsdp_wrapped_module.{inside_layers('_fsdp_wrapped_module')(name)}",
        "'_fsdp_wrapped_module.'",
    ),
    "checkpointed layers": (inside_layers("_checkpoint_wrapped_module"), "'_checkpoint_wrapped_module.'"),
    "compiled layers": (inside_layers("_orig_mod"), "'_orig_mod.'"),
}


@pytest.mark.parametrize(("rename", "words"), WRAPPED.values(), ids=WRAPPED.keys())
def test_a_wrappers_names_are_taken_off_and_named(copy: Path, rename: Rename, words: str) -> None:
    plain = open_checkpoint(str(copy))
    expected = {name: plain.read(name).clone() for name in plain.tensors}
    sha256 = plain.sha256
    found = open_checkpoint(str(renamed(copy, rename)))
    assert found.sha256 == sha256 and found.facts == plain.facts
    assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())
    (warning,) = found.warnings
    assert words in warning


def test_a_wrapped_checkpoint_is_verified(copy: Path, tmp_path: Path) -> None:
    renamed(copy, WRAPPED["both"][0])
    export(str(copy), tmp_path / "b", ExportOptions(), force=False, progress=NoProgress())
    assert "which a wrapper put into them" in open_bundle(tmp_path / "b").manifest.warnings[0]
    assert verify(tmp_path / "b", reference=str(copy), greedy_steps=2).passed


def test_a_wrapped_decoder_alone(tmp_path: Path) -> None:
    save_random_doge(tmp_path / "whole")
    DogeModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "bare")
    plain = open_checkpoint(str(tmp_path / "bare"))
    found = open_checkpoint(str(renamed(tmp_path / "bare", lambda name: f"module.{name}")))
    assert found.tensors.keys() == plain.tensors.keys() and found.warnings


AMBIGUOUS: dict[str, tuple[Rename, str]] = {
    "some tensors": (lambda name: f"policy.{name}" if "layers.0" in name else name, "missing"),
    "all but one": (lambda name: name if name == "model.norm.weight" else f"policy.{name}", "unexpected"),
    "two prefixes": (lambda name: f"{'a' if 'layers.0' in name else 'b'}.{name}", "unexpected"),
    "a longer name": (lambda name: name.replace("self_attn", "attention"), "not a Doge's weights"),
}


@pytest.mark.parametrize(("rename", "words"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_other_names_are_refused_as_before(copy: Path, rename: Rename, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        open_checkpoint(str(renamed(copy, rename)))


def test_two_readings_are_refused(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    twice = {**tensors, **{f"module.{name}": tensor.clone() for name, tensor in tensors.items()}}
    save_file(twice, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="unexpected"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("age", [legacy, early(lambda path: None)], ids=["2025-08", "2025-03"])
def test_names_of_legacy_revisions_stay(copy: Path, age: Callable[[Path], None]) -> None:
    age(copy)
    assert open_checkpoint(str(copy)).facts.is_legacy
    with pytest.raises(UnsupportedModelError):
        open_checkpoint(str(renamed(copy, lambda name: f"module.{name}")))


def head_alone(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    tensors[HEAD] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def test_a_tied_head_alone_is_the_embedding_too(copy: Path, tmp_path: Path) -> None:
    ids = torch.arange(9)[None]
    logits = AutoModelForCausalLM.from_pretrained(copy)(ids).logits
    sha256 = open_checkpoint(str(copy)).sha256
    head_alone(copy)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(copy)(ids).logits, logits)
    found = open_checkpoint(str(copy))
    assert found.sha256 == sha256 and found.as_stored
    export(str(copy), tmp_path / "b", ExportOptions(), force=False, progress=NoProgress())
    assert verify(tmp_path / "b", reference=str(copy), greedy_steps=2).passed


def test_an_untied_head_alone_is_not(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    head_alone(copy)
    with pytest.raises(UnsupportedModelError, match="1 missing: model"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("before", ["./", ".//", "././"])
def test_an_index_with_a_dot(copy: Path, before: str) -> None:
    sha256 = open_checkpoint(str(copy)).sha256
    (copy / WEIGHTS).rename(copy / "model-00001-of-00001.safetensors")
    names = load_file(copy / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, f"{before}model-00001-of-00001.safetensors")}
    (copy / INDEX).write_text(json.dumps(index))
    found = open_checkpoint(str(copy))
    assert found.sha256 == sha256 and found.as_stored
    AutoModelForCausalLM.from_pretrained(copy)


def test_an_index_without_metadata_is_verified_though_transformers_cannot_read_it(copy: Path, tmp_path: Path) -> None:
    names = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).rename(copy / "model-00001-of-00001.safetensors")
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    with pytest.raises(KeyError, match="metadata"):
        AutoModelForCausalLM.from_pretrained(copy)
    export(str(copy), tmp_path / "b", ExportOptions(), force=False, progress=NoProgress())
    assert verify(tmp_path / "b", reference=str(copy), greedy_steps=2).passed


@pytest.mark.parametrize("before", ["../", "/tmp/", ".../", "a/", "./../"])
def test_an_index_that_leads_elsewhere_is_refused(copy: Path, before: str) -> None:
    names = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, f"{before}model.safetensors")}))
    with pytest.raises(UnsupportedModelError, match=r"must be the name of a \.safetensors file"):
        open_checkpoint(str(copy))
