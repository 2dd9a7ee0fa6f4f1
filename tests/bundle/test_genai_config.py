"""genai_config.json; that onnxruntime-genai runs it is shown by `nox -s interop-genai`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import shared_bundle
from random_doge import SMALL

from doge_deploy.bundle.genai_config import follows_convention, genai_config
from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.signature import GraphTensor, make_signature
from doge_deploy.config.model import DogeFacts

FACTS = DogeFacts.from_config({**SMALL, "model_type": "doge"})


def document(generation_config: dict[str, Any] | None, facts: DogeFacts = FACTS) -> dict[str, Any]:
    signature = make_signature(facts, "growing", dtype="float32", max_length=48, last_logits=True)
    return genai_config(
        facts, Layout("model.growing.onnx", signature, True), max_length=48, generation_config=generation_config
    )


def test_names_are_those_of_the_signature() -> None:
    decoder = document(None)["model"]["decoder"]
    signature = make_signature(FACTS, "growing", dtype="float32", max_length=48, last_logits=True)
    for specs, names in ((signature.inputs, decoder["inputs"]), (signature.outputs, decoder["outputs"])):
        layers = range(FACTS.num_hidden_layers)
        spelled = {name % layer if "%d" in name else name for name in names.values() for layer in layers}
        assert spelled == {spec.name for spec in specs}
    assert decoder["filename"] == "model.growing.onnx"


def test_sizes() -> None:
    model = document(None)["model"]
    assert (model["context_length"], model["vocab_size"]) == (48, 64)
    decoder = model["decoder"]
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert [decoder[name] for name in sizes] == [8, 32, 4, 2, 2]


def test_token_ids_of_the_generation_config_come_first() -> None:
    model = document({"eos_token_id": [1, 5], "pad_token_id": None})["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (0, [1, 5], 2)


def test_absent_token_ids_are_left_out() -> None:
    without = {key: value for key, value in SMALL.items() if not key.endswith("_token_id")}
    model = document(None, DogeFacts.from_config({**without, "model_type": "doge"}))["model"]
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & model.keys()


SEARCH: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "nothing-said": (None, {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}),
    "sampling": (
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 50},
    ),
    "settings-without-sampling": ({"temperature": 0.8, "top_k": 5}, {"temperature": 1.0, "top_k": 50}),
    "penalty": ({"repetition_penalty": 1.1}, {"do_sample": False, "repetition_penalty": 1.1}),
}


@pytest.mark.parametrize(("generation_config", "expected"), SEARCH.values(), ids=SEARCH.keys())
def test_search(generation_config: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    search = document(generation_config)["search"]
    assert {name: search[name] for name in expected} == expected
    assert search["max_length"] == 48
    assert search["past_present_share_buffer"] is False


def test_it_is_in_bundles_with_a_growing_graph(tiny_bundle: Path) -> None:
    written = json.loads((tiny_bundle / "genai_config.json").read_text())
    lowered = open_bundle(tiny_bundle).layout("growing").lowered["ort"]
    assert written["model"]["decoder"]["filename"] == lowered.file == "model.growing.ort.onnx"
    assert written["search"]["past_present_share_buffer"] is lowered.shares_buffers is True
    assert "genai_config.json" in open_bundle(tiny_bundle).manifest.files


def test_graphs_beyond_the_convention_are_told_apart() -> None:
    signature = make_signature(FACTS, "growing", dtype="float32", max_length=48, last_logits=True)
    assert follows_convention(signature)
    state = GraphTensor("past_state", "int64", (1,))
    assert not follows_convention(replace(signature, inputs=(*signature.inputs, state)))
    assert not follows_convention(replace(signature, outputs=(*signature.outputs, state)))
    short = [
        replace(spec, shape=(*spec.shape[:2], "kept", *spec.shape[3:])) if spec.name.startswith("present.") else spec
        for spec in signature.outputs
    ]
    assert not follows_convention(replace(signature, outputs=tuple(short)))


def test_it_is_in_no_other(dense_doge: Path) -> None:
    assert not (shared_bundle(dense_doge) / "genai_config.json").exists()
