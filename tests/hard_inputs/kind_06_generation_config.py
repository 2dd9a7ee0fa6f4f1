"""generation_config.json with values that are not legal, and with legal ones in another spelling."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from doge_deploy.options.generation import illegal_settings
from hard_inputs.frame import Case, Outcome, command, demo_copy, right, wrong

KIND = "6 generation_config.json"

ILLEGAL: dict[str, dict[str, Any]] = {
    "temperature 0": {"do_sample": True, "temperature": 0.0},
    "negative temperature": {"do_sample": True, "temperature": -1},
    "temperature as a text": {"do_sample": True, "temperature": "0.7"},
    "top_k -1": {"do_sample": True, "top_k": -1},
    "top_k 1.5": {"do_sample": True, "top_k": 1.5},
    "top_p 1.1": {"do_sample": True, "top_p": 1.1},
    "min_p as a text": {"do_sample": True, "min_p": "low"},
    "penalty 0": {"repetition_penalty": 0},
    "penalty beyond float32": {"repetition_penalty": 1e39},
    "do_sample as a text": {"do_sample": "yes"},
    "max_new_tokens 0": {"max_new_tokens": 0},
    "max_new_tokens 2.5": {"max_new_tokens": 2.5},
    "null among the ends": {"eos_token_id": [1, None]},
    "an end as a text": {"eos_token_id": "</s>"},
    "an empty stop string": {"stop_strings": [""]},
    "a stop string that is a number": {"stop_strings": [3]},
}
LEGAL: dict[str, dict[str, Any]] = {
    "whole numbers as 50.0": {"do_sample": True, "top_k": 50.0, "max_new_tokens": 3.0, "eos_token_id": 1.0},
    "ends with a fraction of 0": {"eos_token_id": [1.0, 5.0]},
    "temperature 0 without sampling": {"do_sample": False, "temperature": 0.0, "top_k": -1, "top_p": 7},
    "nulls": {"temperature": None, "top_k": None, "eos_token_id": None, "max_new_tokens": None},
    "nothing": {},
    "temperature as a whole number": {"do_sample": True, "temperature": 1},
    "penalty at the end of float32": {"repetition_penalty": 3.4e38},
}


@cache
def exported() -> Path:
    """One bundle of doge-tiny; only its generation_config.json differs from case to case."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    ended = command("export", demo_copy(folder), "-o", folder / "bundle")
    assert ended.code == 0, ended.errors
    return folder / "bundle"


def bundle_with(folder: Path, config: dict[str, Any]) -> Path:
    from dataclasses import replace

    from doge_deploy.bundle.files import file_entries
    from doge_deploy.bundle.opening import open_bundle
    from doge_deploy.bundle.writing import write_manifest

    target = folder / "bundle"
    shutil.copytree(exported(), target)
    (target / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_manifest(target, replace(open_bundle(exported(), check="quick").manifest, files=file_entries(target)))
    return target


def generate(bundle: Path, *arguments: object) -> Any:
    return command("generate", bundle, "--prompt", "hi", *arguments)


def illegal(config: dict[str, Any], folder: Path) -> Outcome:
    """Named at export, refused at generate with the file and the name, taken where the user gives another value."""
    name = next(name for name in config if name != "do_sample" or len(config) == 1)
    said = "stop=" if name == "stop_strings" else f"{name}="
    if not any(text.startswith(said) for text in illegal_settings(config)):
        return wrong(f"not named at export: {illegal_settings(config)}")
    bundle = bundle_with(folder, config)
    instead: dict[str, Sequence[object]] = {
        "temperature": ("--temperature", 1),
        "top_k": ("--top-k", 5),
        "top_p": ("--top-p", 0.5),
        "repetition_penalty": ("--repetition-penalty", 1),
        "do_sample": ("--greedy",),
        "max_new_tokens": ("--max-new-tokens", 2),
        "stop_strings": ("--stop", "x"),
    }
    if name in instead:
        ended = generate(bundle, "--max-new-tokens", 2, *instead[name])
        if ended.code != 0:
            return wrong(f"with {instead[name]}: {ended.errors}")
    return generate(bundle).refusal(3, str(bundle / "generation_config.json"), said)  # type: ignore[no-any-return]


def legal(config: dict[str, Any], folder: Path) -> Outcome:
    if named := illegal_settings(config):
        return wrong(f"named at export: {named}")
    ended = generate(bundle_with(folder, config), "--max-new-tokens", 2)
    return right() if ended.code == 0 and "error" not in ended.errors else wrong(ended.errors)


def warned(folder: Path) -> Outcome:
    """The warning of export, and in the manifest."""
    from doge_deploy.bundle.opening import open_bundle

    checkpoint = demo_copy(folder, generation_config=lambda config: config.update(do_sample=True, top_k=-1))
    ended = command("export", checkpoint, "-o", folder / "bundle")
    kept = " ".join(open_bundle(folder / "bundle").manifest.warnings)
    line = "generation_config.json: top_k=-1: must be"
    return right() if line in kept and line in ended.errors else wrong(f"{kept!r}, {ended.errors!r}")


def cases() -> list[Case]:
    return [
        *(Case(name, functools.partial(illegal, config)) for name, config in ILLEGAL.items()),
        *(Case(name, functools.partial(legal, config)) for name, config in LEGAL.items()),
        Case("warned at export", warned),
    ]
