"""What people run instead of a bundle: what is made for it, and how it is driven. The libraries are stand-ins;
`nox -s bench-against` runs the real ones.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import shared_bundle

from doge_deploy.bench.baselines import compiled, genai, llama_cpp, openvino
from doge_deploy.bench.baselines.catalog import BASELINES, LeftOut, Wanted
from doge_deploy.bench.baselines.growing import growing_bundle
from doge_deploy.bench.baselines.llama_gguf import TYPES, shapes, write_gguf
from doge_deploy.bench.candidates import Candidate
from doge_deploy.bench.workload import Workload
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.names import expected_tensors
from doge_deploy.config.model import DogeFacts
from doge_deploy.errors import UnsupportedModelError

V = 5
"""Vocabulary of the stand-ins."""


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """A module that `import NAME` finds."""
    made = ModuleType(name)
    made.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def wanted(bundles: Sequence[Bundle], cache: Path, model: str = "doge-tiny") -> tuple[Wanted, list[Any]]:
    """What baselines are asked for, and a list of what they ask to be made."""
    made: list[Any] = []
    workloads = [Workload(1, 0, 16, 4), Workload(1, 8, 16, 4)]
    checkpoint = open_checkpoint(model)
    return Wanted(bundles, checkpoint, workloads, cache, lambda name, request: made.append((name, request))), made


def tiny(**options: Any) -> Bundle:
    return open_bundle(shared_bundle("doge-tiny", num_layers=1, **options))


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_made_without_the_library_that_it_runs(name: str) -> None:
    loaded = BASELINES[name].load()
    assert callable(loaded.candidates) and callable(loaded.open_runner) and loaded.LIBRARIES


# compile


def test_the_cache_of_compile_is_as_long_as_the_longest_workload(tmp_path: Path) -> None:
    (candidate,) = compiled.candidates(wanted([tiny()], tmp_path)[0])
    assert candidate.max_length == 8 + 16 + 2 + 4


def test_compile_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LeftOut, match=r"needs a C\+\+ compiler, one of g\+\+, clang\+\+"):
        compiled.candidates(wanted([tiny()], tmp_path)[0])


# a growing bundle


def test_a_growing_bundle_without_functions_is_taken_as_it_is(tmp_path: Path) -> None:
    bundle = tiny(kv_cache=("growing",), inline_functions=True)
    asked, made = wanted([bundle], tmp_path)
    assert growing_bundle(asked, bundle) == bundle.path and not made


def test_another_one_is_exported_with_the_same_weights(tmp_path: Path) -> None:
    bundle = tiny(quantize="int8", logits="all")
    asked, made = wanted([bundle], tmp_path)
    with pytest.raises(LeftOut):  # nothing was written
        growing_bundle(asked, bundle)
    ((name, request),) = made
    assert name == "growing" and Path(request["output"]).parent == tmp_path
    told = {key: request["options"][key] for key in ("quantize", "logits", "kv_cache", "inline_functions")}
    assert told == {"quantize": "int8", "logits": "all", "kv_cache": ["growing"], "inline_functions": True}
    assert "routing" not in request["options"] and json.dumps(request)
    with pytest.raises(LeftOut):
        growing_bundle(asked, tiny())
    assert made[1][1]["output"] != request["output"], "other weights, another file"


# onnxruntime-genai and OpenVINO


def test_one_candidate_for_each_kind_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genai, "growing_bundle", lambda asked, bundle: Path(bundle.manifest.options.quantize or "fp32"))
    bundles = [tiny(), tiny(quantize="int8"), tiny(logits="all")]
    found = genai.candidates(wanted(bundles, tmp_path)[0])
    assert [(c.name, c.path, c.weights, c.rows) for c in found] == [
        ("genai fp32", "fp32", "fp32", 1),
        ("genai int8", "int8", "int8", 1),
    ]
    (alone,) = openvino.candidates(wanted(bundles[:1], tmp_path)[0])
    assert (alone.name, alone.rows) == ("openvino", None)


def test_genai_gets_the_given_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    class Generator:
        def __init__(self, model: Any, parameters: Any) -> None:
            log.append("new")

        def append_tokens(self, ids: Any) -> None:
            log.append((ids.dtype.name, ids.tolist()))

        def get_logits(self) -> Any:
            return np.zeros((1, 1, V), np.float32)

    class Config:
        def __init__(self, path: str) -> None:
            log.append(path)

        def overlay(self, text: str) -> None:
            log.append(json.loads(text))

    parameters = SimpleNamespace(set_search_options=lambda **options: log.append(options["max_length"]))
    module(
        monkeypatch,
        "onnxruntime_genai",
        Config=Config,
        Model=lambda config: config,
        Generator=Generator,
        GeneratorParams=lambda model: parameters,
    )
    runner = genai.open_runner(Candidate("genai", "genai", "b", "float32", 32, V), threads=3)
    runner.reset(1)
    runner.run(np.array([[1, 2]]))
    runner.run(np.array([[3]]))
    threads = {"model": {"decoder": {"session_options": {"intra_op_num_threads": 3}}}}
    assert log == ["b", threads, 32, "new", ("int32", [[1, 2]]), ("int32", [[3]])]


def test_openvino_keeps_the_caches_as_states(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny(kv_cache=("growing",), inline_functions=True)
    pairs, fed, compiled_with = {}, [], {}
    states = [
        SimpleNamespace(name="past_key_values.0.keypresent.0.key", state=SimpleNamespace(shape=(0, 1, 0, 4), data=None))
    ]

    def infer(feeds: dict[str, Any], **unused: Any) -> dict[str, Any]:
        fed.append({name: value.tolist() for name, value in feeds.items()})
        return {"logits": np.zeros((2, 1, V), np.float32)}

    request = SimpleNamespace(query_state=lambda: states, infer=infer)

    def compile_model(model: Any, device: str, options: dict[str, Any]) -> Any:
        compiled_with.update(options)
        return SimpleNamespace(create_infer_request=lambda: request)

    core = SimpleNamespace(read_model=lambda path: path, compile_model=compile_model)
    tensor = lambda array: SimpleNamespace(shape=array.shape, data=array)  # noqa: E731
    module(monkeypatch, "openvino", Core=lambda: core, Tensor=tensor)
    transform = lambda model, names: pairs.update({model: names})  # noqa: E731
    module(monkeypatch, "openvino._offline_transformations", apply_make_stateful_transformation=transform)

    runner = openvino.open_runner(Candidate("openvino", "openvino", str(bundle.path), "float32", 32, V), threads=3)
    ((graph, names),) = pairs.items()
    assert graph == bundle.path / bundle.layout("growing").file
    assert names["past_key_values.0.key"] == "present.0.key" and len(names) == 2
    assert (compiled_with["INFERENCE_NUM_THREADS"], compiled_with["INFERENCE_PRECISION_HINT"]) == (3, "f32")
    runner.reset(2)
    assert states[0].state.shape == (2, 1, 0, 4), "empty, for two rows"
    runner.run(np.array([[1, 2], [3, 4]]))
    runner.run(np.array([[5], [6]]))
    assert fed[1]["attention_mask"] == [[1, 1, 1]] * 2 and fed[1]["position_ids"] == [[2]] * 2
    assert list(runner.cache()) == ["present.0.key"]


# llama.cpp


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "head"])
def test_the_llama_has_the_shape_of_the_checkpoint(tied: bool) -> None:
    facts = replace(tiny().manifest.facts, tie_word_embeddings=tied)
    ours = sum(prod(shape) for shape in expected_tensors(facts).values())
    theirs = sum(prod(shape) for shape in shapes(facts).values())
    assert 0.98 < theirs / ours <= 1.0


class Gguf:
    """Stands for the package `gguf`: keeps what is written."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.GGMLQuantizationType = SimpleNamespace(F32="F32", Q8_0="Q8_0")
        self.quants = SimpleNamespace(quantize=lambda weight, kind: (kind, weight.shape, weight.std()))

    def GGUFWriter(self, path: str, architecture: str) -> Any:
        self.path, self.architecture = Path(path), architecture
        return self

    def add_tensor(self, name: str, tensor: Any, raw_dtype: Any = None) -> None:
        self.tensors[name] = tensor

    def write_tensors_to_file(self) -> None:
        self.path.write_text("whole")

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.facts.update({name: values})


def test_the_file_of_the_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, facts = Gguf(), tiny().manifest.facts
    monkeypatch.setitem(sys.modules, "gguf", written)  # type: ignore[arg-type]
    llama_cpp.make(str(tmp_path / "new" / "a.gguf"), facts.to_json(), "Q8_0")
    assert (tmp_path / "new" / "a.gguf").read_text() == "whole" and len(list((tmp_path / "new").iterdir())) == 1
    assert written.architecture == "llama" and written.facts["add_block_count"] == (facts.num_hidden_layers,)
    kind, shape, deviation = written.tensors["blk.0.attn_k.weight"]
    assert (kind, shape) == ("Q8_0", (facts.num_key_value_heads * facts.head_dim, facts.hidden_size))
    assert deviation == pytest.approx(0.02, rel=0.1)
    assert written.tensors["output_norm.weight"].dtype == np.float32, "norms are not quantized"


def test_half_a_file_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Gguf()
    monkeypatch.setitem(sys.modules, "gguf", written)  # type: ignore[arg-type]
    monkeypatch.setattr(written, "write_tensors_to_file", lambda: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        write_gguf(tmp_path / "a.gguf", tiny().manifest.facts, "F32")
    assert not list(tmp_path.iterdir())


def test_a_llama_for_each_kind_of_weights_and_no_other_bundle(tmp_path: Path) -> None:
    asked, made = wanted([tiny(), tiny(quantize="int8")], tmp_path)
    found = llama_cpp.candidates(asked)
    told = [(c.name, c.weights, c.same_model) for c in found]
    assert told == [("llama.cpp F32", "fp32", False), ("llama.cpp Q8_0", "int8", False)]
    assert [request["kind"] for _, request in made] == ["F32", "Q8_0"] and set(TYPES) >= {"fp32", "int8", "int4"}
    for candidate in found:
        Path(candidate.path).touch()
    llama_cpp.candidates(asked)
    assert len(made) == 2, "what is there is not made again"


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"is_moe": True}, "no Llama has the shape of a mixture"), ({"hidden_size": 40}, "Q8_0 needs rows of a multiple")],
    ids=["mixture", "blocks"],
)
def test_what_no_llama_is_like_is_left_out(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    asked, made = wanted([tiny(quantize="int8")], tmp_path)
    checkpoint = replace(asked.checkpoint, facts=replace(asked.checkpoint.facts, **changes))
    with pytest.raises(LeftOut, match=says):
        llama_cpp.candidates(replace(asked, checkpoint=checkpoint))
    assert not made


class Llama:
    """Stands for the package `llama_cpp`: the logits of a token are its id, its position and its row."""

    status = 0

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, int, int, bool]]] = []
        self.contexts: list[Any] = []
        self.cleared = 0
        self.logits = (ctypes.c_float * 10000)()

    def llama_context_default_params(self) -> Any:
        return SimpleNamespace()

    def llama_init_from_model(self, model: Any, parameters: Any) -> Any:
        self.contexts.append(parameters)
        return parameters

    def llama_free(self, context: Any) -> None: ...

    def llama_get_memory(self, context: Any) -> Any: ...

    def llama_memory_clear(self, memory: Any, data: bool) -> None:
        self.cleared += 1

    def llama_batch_init(self, tokens: int, embeddings: int, sequences: int) -> Any:
        ints = ctypes.c_int32 * tokens
        self.kept = [(ctypes.c_int32 * 1)() for _ in range(tokens)]
        return SimpleNamespace(
            n_tokens=0,
            token=ctypes.cast(ints(), ctypes.POINTER(ctypes.c_int32)),
            pos=ctypes.cast(ints(), ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=ints(),
            seq_id=self.kept,
            logits=(ctypes.c_int8 * tokens)(),
        )

    def llama_decode(self, context: Any, batch: Any) -> int:
        assert batch.n_tokens <= context.n_batch
        places = range(batch.n_tokens)
        call = [(batch.token[i], batch.pos[i], batch.seq_id[i][0], bool(batch.logits[i])) for i in places]
        self.calls.append(call)
        for index, (token, position, row, _) in enumerate(one for one in call if one[3]):
            self.logits[index * V : index * V + 3] = [token, position, row]
        return self.status

    def llama_get_logits(self, context: Any) -> Any:
        return self.logits


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Llama:
    library = Llama()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)  # type: ignore[arg-type]
    return library


def test_rows_are_sequences_of_llama_cpp(llama: Llama) -> None:
    runner = llama_cpp.LlamaCppRunner(object(), V, threads=3, max_length=10, last_logits=True)
    runner.reset(2)
    assert (llama.contexts[0].n_ctx, llama.contexts[0].n_seq_max, llama.contexts[0].n_threads) == (20, 2, 3)
    first = runner.run(np.array([[1, 2, 3], [4, 0, 1]]))
    second = runner.run(np.array([[2], [3]]))
    assert llama.calls[0] == [
        (1, 0, 0, False),
        (2, 1, 0, False),
        (3, 2, 0, True),
        (4, 0, 1, False),
        (0, 1, 1, False),
        (1, 2, 1, True),
    ]
    assert first[:, 0, :3].tolist() == [[3, 2, 0], [1, 2, 1]] and second[:, 0, :3].tolist() == [[2, 3, 0], [3, 3, 1]]
    runner.reset(2)
    assert llama.cleared == 1 and len(llama.contexts) == 1, "the context is kept"
    runner.run(np.array([[2], [3]]))
    assert [position for _, position, _, _ in llama.calls[-1]] == [0, 0]
    runner.reset(1)
    assert len(llama.contexts) == 2


def test_a_long_call_goes_in_pieces_and_gives_all_logits(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "_CALL", 4)
    runner = llama_cpp.LlamaCppRunner(object(), V, threads=1, max_length=10, last_logits=False)
    runner.reset(2)
    logits = runner.run(np.array([[1, 2, 3, 4, 0], [4, 3, 2, 1, 0]]))
    assert [len(call) for call in llama.calls] == [4, 4, 2]
    assert logits[0, :, 0].tolist() == [1, 2, 3, 4, 0] and logits[1, :, 0].tolist() == [4, 3, 2, 1, 0]
    assert logits[1, :, 1].tolist() == [0, 1, 2, 3, 4], "positions go on"


def test_a_call_that_llama_cpp_refuses_is_an_error(llama: Llama) -> None:
    runner = llama_cpp.LlamaCppRunner(object(), V, threads=1, max_length=10, last_logits=True)
    runner.reset(1)
    llama.status = 1
    with pytest.raises(UnsupportedModelError, match="a call of 2 tokens failed with status 1"):
        runner.run(np.array([[1, 2]]))


def test_facts_survive_the_way_to_the_process() -> None:
    facts = tiny().manifest.facts
    assert DogeFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
