"""Checkpoints as trainers leave them: names of wrappers, a tied head alone, keys of other tools, LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from doge_deploy.checkpoint import open_checkpoint
from hard_inputs.frame import DEMO, Case, Outcome, command, demo_copy, equal, right, wrong

KIND = "5 checkpoints, keys, LoRA"

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, torch.Tensor]


def rewritten(path: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    save_file(edit(load_file(path / WEIGHTS)), path / WEIGHTS, metadata={"format": "pt"})
    return path


def same_as_the_demo(path: Path, *words: str, **how: Any) -> Outcome:
    """The tensors of doge-tiny, and a warning that has each of `words` (none at all where there are no words)."""
    found, demo = open_checkpoint(str(path), **how), open_checkpoint(str(DEMO))
    if found.sha256 != demo.sha256 or any(not torch.equal(found.read(n), demo.read(n)) for n in demo.tensors):
        return wrong("other tensors than transformers'")
    said = "; ".join(found.warnings)
    missing = [word for word in words if word not in said]
    return wrong(f"{missing} not in {said!r}") if missing or bool(words) != bool(said) else right(said)


def renamed(name: str, rename: Callable[[str], str], word: str) -> Case:
    def run(folder: Path) -> Outcome:
        path = rewritten(demo_copy(folder), lambda tensors: {rename(key): t for key, t in tensors.items()})
        return same_as_the_demo(path, word)

    return Case(name, run)


def with_keys(name: str, keys: dict[str, Any], *words: str) -> Case:
    def run(folder: Path) -> Outcome:
        return same_as_the_demo(demo_copy(folder, config=lambda config: {**config, **keys}), *words)

    return Case(name, run)


def not_exported(name: str, make: Callable[[Path], Path], words: tuple[str, ...], *more: str, code: int = 3) -> Case:
    def run(folder: Path) -> Outcome:
        path = make(folder)
        arguments = [word.format(folder=folder) for word in more]
        outcome = command("export", path, "-o", folder / "b", *arguments).refusal(code, *words)
        return wrong("something was left behind") if (folder / "b").exists() else outcome

    return Case(name, run)


def head_alone(folder: Path) -> Outcome:
    def edit(tensors: Tensors) -> Tensors:
        tensors[HEAD] = tensors.pop(EMBEDDING)
        return tensors

    return same_as_the_demo(rewritten(demo_copy(folder), edit))


def index_with(before: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = demo_copy(folder)
        (path / WEIGHTS).rename(path / "model-00001-of-00001.safetensors")
        names = load_file(path / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, f"{before}model-00001-of-00001.safetensors")}
        (path / INDEX).write_text(json.dumps(index))
        return path

    return make


def adapter(folder: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    """A rank-2 adapter of the first layer's queries."""
    path = folder / "adapter"
    path.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 2, "lora_alpha": 4}
    config |= {"target_modules": ["layers.0.self_attn.q_proj"], **changes}
    (path / "adapter_config.json").write_text(json.dumps(config))
    weight = load_file(DEMO / WEIGHTS)["model.layers.0.self_attn.q_proj.weight"]
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{prefix}A.weight": torch.ones(2, weight.shape[1]), f"{prefix}B.weight": torch.ones(weight.shape[0], 2)}
    save_file({**pair, **(tensors or {})}, path / "adapter_model.safetensors")
    return path


def merged(folder: Path, scaling: float, **changes: Any) -> Outcome:
    name = "model.layers.0.self_attn.q_proj.weight"
    found = open_checkpoint(str(DEMO), adapter=str(adapter(folder, **changes)))
    before = load_file(DEMO / WEIGHTS)[name]
    return equal(torch.equal(found.read(name), before + torch.full_like(before, 2.0) * scaling), True)


def beside(folder: Path) -> Outcome:
    path = demo_copy(folder)
    for file in adapter(folder).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return same_as_the_demo(path, "which is not merged")


def refused_adapter(name: str, words: tuple[str, ...], tensors: Tensors | None = None, **changes: Any) -> Case:
    def make(folder: Path) -> Path:
        adapter(folder, tensors, **changes)
        return DEMO

    return not_exported(name, make, words, "--adapter", "{folder}/adapter")


def cases() -> list[Case]:
    typo = {"keep_window_sise": 8}
    return [
        Case("tied head alone", head_alone),
        *(
            Case(f"index with {before!r}", lambda folder, before=before: same_as_the_demo(index_with(before)(folder)))
            for before in ("./", ".//", "././")
        ),
        *(
            not_exported(f"index with {before!r}", index_with(before), ("must be the name of a .safetensors file",))
            for before in ("../", "/tmp/", "a/")
        ),
        renamed("DistributedDataParallel", lambda name: f"module.{name}", "module."),
        renamed("torch.compile", lambda name: f"_orig_mod.{name}", "_orig_mod."),
        renamed("merged by hand from peft", lambda name: f"base_model.model.{name}", "base_model.model."),
        renamed("Lightning", lambda name: f"model.{name}", "model."),
        renamed(
            "activation checkpointing",
            lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
            "_checkpoint_wrapped_module.",
        ),
        not_exported(
            "a prefix on some tensors alone",
            lambda folder: rewritten(
                demo_copy(folder), lambda t: {(f"policy.{k}" if "layers.1." in k else k): v for k, v in t.items()}
            ),
            ("missing", "unexpected"),
        ),
        not_exported(
            "a value head beside the model",
            lambda folder: rewritten(demo_copy(folder), lambda t: {**t, "v_head.summary.weight": torch.ones(2)}),
            ("1 unexpected: v_head.summary.weight",),
        ),
        with_keys("transformers.js", {"transformers.js_config": {}}, "transformers.js_config={} is ignored"),
        with_keys(
            "unsloth", {"unsloth_version": "2025.6.1", "unsloth_fixed": True}, "unsloth_version", "unsloth_fixed"
        ),
        with_keys("a legacy key in today's layout", {"dynamic_mask_ratio": 0.0}, "dynamic_mask_ratio=0.0 is ignored"),
        with_keys("legacy experts of a dense model", {"num_cdmoe_experts": 16348}, "num_cdmoe_experts=16348"),
        with_keys("a key of three letters more", {"keep_window": 8}, "keep_window=8 is ignored"),
        with_keys("old generation settings", {"temperature": 0.7, "max_new_tokens": 20}),
        not_exported(
            "a misspelt key",
            lambda folder: demo_copy(folder, config=lambda config: {**config, **typo}),
            ("keep_window_sise", "did you mean 'keep_window_size'?"),
        ),
        not_exported(
            "an unknown key with --strict",
            lambda folder: demo_copy(folder, config=lambda config: {**config, "unsloth_fixed": True}),
            ("unknown key 'unsloth_fixed'",),
            "--strict",
        ),
        not_exported(
            "a wrong number of experts",
            lambda folder: demo_copy(folder, config=lambda config: {**config, "is_moe": True, "num_experts": 81}),
            ("missing",),
        ),
        Case("LoRA", lambda folder: merged(folder, 2.0)),
        Case("LoRA, rank-stabilised", lambda folder: merged(folder, 4 / 2**0.5, use_rslora=True)),
        Case("LoRA, alpha by pattern", lambda folder: merged(folder, 5.0, alpha_pattern={"q_proj": 10})),
        Case("LoRA, target by expression", lambda folder: merged(folder, 2.0, target_modules=r".*\.0\..*q_proj")),
        Case("an adapter beside the weights", beside),
        not_exported("an adapter alone", adapter, ("holds a PEFT adapter and no model", "its base, some/base")),
        not_exported("--adapter without one", lambda folder: DEMO, ("no such directory",), "--adapter", "./no", code=2),
        refused_adapter("DoRA", ("DoRA is not merged",), use_dora=True),
        refused_adapter("IA3", ("peft_type='IA3'",), peft_type="IA3"),
        refused_adapter("PiSSA", ("the base was changed before training",), init_lora_weights="pissa"),
        refused_adapter("an option of the future", ("use_hyper=True",), use_hyper=True),
        refused_adapter("another rank", ("must be [3,",), r=3),
        refused_adapter("a stranger's tensor", ("is no tensor of the base",), {"head.weight": torch.ones(2)}),
        refused_adapter("a pair that is missing", ("no pair is stored for it",), target_modules=["q_proj"]),
    ]
