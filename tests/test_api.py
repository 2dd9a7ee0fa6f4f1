"""The public functions: what they return and raise, and that they compute what the command line does."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle, shared_bundle
from scripted_runner import ScriptedRunner

import doge_deploy
import doge_deploy.runtime.ort
from doge_deploy import api
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import (
    BrokenBundleError,
    MismatchError,
    MissingDependencyError,
    UnsupportedModelError,
    UsageError,
)
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.sampling import SamplingOptions

PROMPT = "A list is"
GREEDY: doge_deploy.TextChoices = {"do_sample": False}
"""The generation_config.json of doge-tiny asks for sampling."""
CHAT = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def last_bundle() -> Path:
    """doge-tiny with logits of the last token alone, as `export` makes it where nothing else is asked for."""
    return shared_bundle("doge-tiny")


def said(capfd: pytest.CaptureFixture[str], bundle: Path, *arguments: str) -> str:
    """What the command line generates."""
    capfd.readouterr()
    assert run_command(["generate", str(bundle), "--quiet", *arguments]) == 0
    return capfd.readouterr().out.removesuffix("\n")


class TestPackage:
    def test_names_are_those_of_the_api(self) -> None:
        assert doge_deploy.__all__ == api.__all__
        assert set(api.__all__) <= set(dir(doge_deploy))
        for name in set(api.__all__) - {"verify"}:
            assert getattr(doge_deploy, name) is getattr(api, name)

    def test_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="'doge_deploy' has no attribute 'exprot'"):
            _ = doge_deploy.exprot  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        "before",
        [
            "import doge_deploy.verify.held_out",
            pytest.param("", marks=pytest.mark.sweep),
            pytest.param("from doge_deploy import verify", marks=pytest.mark.sweep),
        ],
    )
    def test_verify_is_a_function_whatever_was_imported(self, before: str) -> None:
        code = f"""{before}
import doge_deploy
try:
    doge_deploy.verify("none")
except doge_deploy.UsageError as error:
    print(error)
from doge_deploy.verify.held_out import HELD_OUT
assert callable(doge_deploy.verify)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.startswith("none is not a directory"), done.stderr

    def test_every_public_function_says_what_it_raises(self) -> None:
        for function in (api.export, api.build, api.verify, api.load, api.TextModel.generate, api.TextModel.logits):
            text = inspect.getdoc(function) or ""
            assert all(f"{part}:" in text for part in ("Args", "Returns", "Raises")), function


class TestExport:
    def test_the_bundle_is_that_of_the_command_line(self, tmp_path: Path) -> None:
        made = doge_deploy.export("doge-tiny", str(tmp_path / "a"), quantize="int8", max_length=128)
        assert made.path == tmp_path / "a" and made.manifest == open_bundle(tmp_path / "a").manifest
        line = ["export", "doge-tiny", "-o", str(tmp_path / "b"), "--quantize", "int8", "--max-length", "128"]
        assert run_command(line) == 0
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name

    def test_a_keyword_replaces_a_field_of_the_options(self, tmp_path: Path) -> None:
        options = doge_deploy.ExportOptions(max_length=64, logits="all")
        made = doge_deploy.export("doge-tiny", tmp_path / "a", options, max_length=32)
        assert made.manifest.max_length == 32
        assert open_bundle(tmp_path / "a").layout().signature == made.manifest.layouts["static"].signature
        assert not open_runner(made).last_logits

    def test_progress_is_told(self, tmp_path: Path) -> None:
        stages = []

        class Listener:
            def stage(self, name: str, total: int = 1) -> Any:
                stages.append(name)
                return lambda done: None

        doge_deploy.export("doge-tiny", tmp_path / "a", progress=Listener())
        assert stages[0] == "check checkpoint" and "write weights" in stages

    @pytest.mark.parametrize(
        ("keywords", "says"),
        [
            ({"dtpye": "fp16"}, "unknown key 'dtpye' (did you mean 'dtype'?); known: task, dtype"),
            ({"dtype": "fp8"}, "dtype='fp8': must be one of fp32, fp16, bf16"),
            ({"max_length": 0, "logits": "no"}, "max_length=0: must be a whole number"),
            ({"options": {"dtype": "fp16"}}, "options={'dtype': 'fp16'}: must be ExportOptions"),
            ({"options": doge_deploy.BuildOptions()}, "must be ExportOptions"),
            ({"quantize": "int8", "dtype": "fp16"}, "quantize=int8 with dtype=fp16"),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(value),
    )
    def test_usage(self, keywords: dict[str, Any], says: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught:
            doge_deploy.export("doge-tiny", tmp_path / "a", **keywords)
        assert says in str(caught.value) and not str(caught.value).startswith("-")
        assert not list(tmp_path.iterdir())

    def test_an_unsupported_model(self, tmp_path: Path) -> None:
        shutil.copytree(Path(api.__file__).parent / "demo" / "doge-tiny", tmp_path / "model")
        config = tmp_path / "model" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "llama"}))
        with pytest.raises(UnsupportedModelError, match="not a Doge"):
            doge_deploy.export(tmp_path / "model", tmp_path / "a")


class TestBuild:
    @pytest.mark.parametrize(
        ("keywords", "says"),
        [
            ({"batch_size": 0}, "batch_size=0: must be a whole number >= 1"),
            ({"targt": "trt"}, "unknown key 'targt' (did you mean 'target'?)"),
        ],
        ids=["value", "name"],
    )
    def test_usage(self, keywords: dict[str, Any], says: str, last_bundle: Path) -> None:
        with pytest.raises(UsageError) as caught:
            doge_deploy.build(last_bundle, **keywords)
        assert str(caught.value).startswith(says)

    def test_a_missing_target(self, last_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(MissingDependencyError):
            doge_deploy.build(last_bundle, target="trt")


class TestVerify:
    def test_a_report_and_no_exit(self, last_bundle: Path) -> None:
        seen = []
        report = doge_deploy.verify(last_bundle, greedy_steps=4, finished=seen.append)
        assert report.passed and seen == report.results
        report.require_passed()
        report.results[0].failures.append("made up")
        assert not report.passed
        with pytest.raises(MismatchError, match=f"does not compute what transformers computes: static/{seen[0].case}"):
            report.require_passed()

    def test_usage(self, last_bundle: Path) -> None:
        with pytest.raises(UsageError, match="paged"):
            doge_deploy.verify(last_bundle, layouts=["paged"])


class TestGenerate:
    @pytest.mark.parametrize("layout", ["static", "growing"])
    def test_text_is_that_of_the_command_line(
        self, layout: str, tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with doge_deploy.load(tiny_bundle, layout=layout, defaults=GREEDY) as model:
            made = model.generate(PROMPT, max_new_tokens=24)
        expected = said(
            capfd, tiny_bundle, "--prompt", PROMPT, "--greedy", "--max-new-tokens", "24", "--layout", layout
        )
        assert made.text == expected
        assert made.finish_reason == "max_new_tokens" and made.statistics.new_tokens == 24

    def test_chat_and_sampling_are_those_of_the_command_line(
        self, tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with doge_deploy.load(tiny_bundle) as model:
            made = model.generate(CHAT, temperature=1.5, seed=3, max_new_tokens=24)
        drawn = ["--temperature", "1.5", "--seed", "3", "--max-new-tokens", "24"]
        assert made.text == said(capfd, tiny_bundle, "--chat", "--prompt", "What is a list?", *drawn)

    def test_pieces_of_a_stream_are_its_text(self, tiny_bundle: Path) -> None:
        with doge_deploy.load(tiny_bundle, defaults=GREEDY) as model:
            stream = model.stream(CHAT)
            assert stream.statistics.finish_reason is None
            pieces = list(stream)
            assert "".join(pieces) == stream.text == model.generate(CHAT).text
            assert stream.statistics.finish_reason == "eos"

    def test_stop_strings_and_an_options_object(self, tiny_bundle: Path) -> None:
        with doge_deploy.load(tiny_bundle, defaults=GREEDY) as model:
            whole = model.generate(PROMPT, max_new_tokens=24).text
            stop = whole[10:14]
            made = model.generate(PROMPT, max_new_tokens=24, stop_strings=stop)
            assert made.finish_reason == "stop" and made.text == whole[: whole.index(stop)]
            options = doge_deploy.GenerationOptions(max_new_tokens=3)
            assert model.generate(PROMPT, options).statistics.new_tokens == 3
            with pytest.raises(UsageError, match="options and seed were given"):
                model.generate(PROMPT, options, seed=1)

    def test_defaults_go_before_the_bundle_and_choices_before_defaults(self, tiny_bundle: Path) -> None:
        # greedily: a drawn text may end by itself before
        with doge_deploy.load(tiny_bundle, defaults={**GREEDY, "max_new_tokens": 5}) as model:
            assert model.generate(PROMPT).statistics.new_tokens == 5
            assert model.generate(PROMPT, max_new_tokens=7).statistics.new_tokens == 7
            assert model.generate(PROMPT, max_new_tokens=None).statistics.new_tokens == 5

    def test_a_seed_of_the_defaults_is_of_all_texts_and_a_seed_of_a_text_of_it_alone(self, tiny_bundle: Path) -> None:
        def texts(**choices: Any) -> list[str]:
            wild = {"temperature": 3.0, "top_k": 0, "max_new_tokens": 8}
            with doge_deploy.load(tiny_bundle, defaults={**wild, "seed": 5}) as model:  # type: ignore[typeddict-item]
                return [model.generate(PROMPT, **choices).text for _ in range(2)]

        first, second = texts()
        assert first != second and texts() == [first, second]
        assert texts(seed=5) == [first, first]

    def test_a_turn_that_continues_is_computed_from_there(self, tiny_bundle: Path) -> None:
        with (
            doge_deploy.load(tiny_bundle, defaults=GREEDY) as model,
            doge_deploy.load(tiny_bundle, defaults=GREEDY) as fresh,
        ):
            first = model.generate(CHAT, max_new_tokens=8)
            chat = [*CHAT, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And?"}]
            second = model.generate(chat, max_new_tokens=8)
            assert second.statistics.cached_tokens >= first.statistics.prompt_tokens
            assert second.text == fresh.generate(chat, max_new_tokens=8).text

    def test_logits_in_between_do_not_change_a_text(self, tiny_bundle: Path) -> None:
        with doge_deploy.load(tiny_bundle, defaults=GREEDY) as model:
            first = model.generate(CHAT, max_new_tokens=8)
            chat = [*CHAT, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And?"}]
            expected = model.generate(chat, max_new_tokens=8).text
            model.generate(CHAT, max_new_tokens=8)
            model.logits(list(range(40, 90)))
            again = model.generate(chat, max_new_tokens=8)
            assert again.statistics.cached_tokens == 0 and again.text == expected

    @pytest.mark.parametrize("between", ["text", "logits", "close"])
    def test_a_stream_ends_where_something_else_begins(self, between: str, tiny_bundle: Path) -> None:
        model = doge_deploy.load(tiny_bundle)
        stream = model.stream(PROMPT)
        assert next(stream)
        if between == "text":
            model.stream("Other")
        elif between == "logits":
            model.logits([5])
        else:
            model.close()
        with pytest.raises(UsageError, match="cannot go on"):
            list(stream)

    def test_closed(self, tiny_bundle: Path) -> None:
        with doge_deploy.load(tiny_bundle) as model:
            pass
        for use in (lambda: model.generate("a"), lambda: model.logits([5]), model.open):
            with pytest.raises(UsageError, match="was closed; load it again"):
                use()

    @pytest.mark.parametrize(
        ("prompt", "choices", "says"),
        [
            (5, {}, "prompt=5: must be a text, or a list of messages"),
            ([], {}, "prompt=[]: must be"),
            (["a"], {}, "prompt=['a']: must be"),
            ("a", {"temprature": 1}, "unknown option 'temprature' (did you mean 'temperature'?)"),
            ("a", {"top_p": 2.0}, "top_p=2.0: must be"),
            ("a", {"max_new_tokens": 0}, "max_new_tokens=0: must be"),
            ("a", {"do_sample": False, "top_k": 5}, "do_sample=False draws no token, so top_k=5 would do nothing"),
            ("a" * 3000, {}, "max_length is 512"),
        ],
        ids=["number", "no message", "texts", "name", "value", "length", "contradiction", "prompt too long"],
    )
    def test_usage_is_said_before_the_model_is_loaded(
        self, prompt: Any, choices: dict[str, Any], says: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = doge_deploy.TextModel(tiny_bundle)
        monkeypatch.setattr(doge_deploy.TextModel, "open", lambda self: pytest.fail("the model was loaded"))
        with pytest.raises(UsageError) as caught:
            model.generate(prompt, **choices)
        assert says in str(caught.value)

    def test_a_model_that_gives_nan(self, last_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = ScriptedRunner(lambda history: 5, vocab_size=1024, max_length=64)
        monkeypatch.setattr(runner, "_run", lambda ids, lengths: np.full((1, 1, 1024), np.nan, np.float32))
        monkeypatch.setattr(doge_deploy.runtime.ort, "open_runner", lambda *_, **__: runner)
        with pytest.raises(UnsupportedModelError):
            doge_deploy.load(last_bundle).generate("a")


class TestLoad:
    def test_what_it_can_refuse(self, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match="is not a directory"):
            doge_deploy.load(tmp_path / "none")
        with pytest.raises(UsageError, match="--layout paged: ort runs static, growing and uncached"):
            doge_deploy.load(tiny_bundle, layout="paged")
        with pytest.raises(UsageError, match="top_p=3: must be"):
            doge_deploy.load(tiny_bundle, defaults={"top_p": 3, "do_sample": True})
        broken = shutil.copytree(tiny_bundle, tmp_path / "broken")
        (broken / "tokenizer.json").unlink()
        with pytest.raises(BrokenBundleError, match=r"tokenizer\.json is missing"):
            doge_deploy.load(broken)
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(MissingDependencyError, match="ONNX Runtime is not installed"):
            doge_deploy.load(tiny_bundle)

    def test_a_bundle_for_another_task(self, tmp_path: Path) -> None:
        bundle = make_bundle("doge-tiny", tmp_path / "a", task="features")
        with pytest.raises(UsageError, match="task=features"):
            doge_deploy.load(bundle)


class TestLogits:
    IDS = (0, 70, 71, 300, 5, 900, 12)

    def test_they_are_those_of_the_graph(self, tiny_bundle: Path) -> None:
        with doge_deploy.load(tiny_bundle) as model:
            logits = model.logits(self.IDS)
        runner = open_runner(open_bundle(tiny_bundle))
        runner.reset()
        assert logits.shape == (len(self.IDS), 1024) and logits.dtype == np.float32
        np.testing.assert_array_equal(logits, runner.run(np.array([self.IDS]))[0])

    def test_of_a_bundle_that_gives_only_the_last(self, tiny_bundle: Path, last_bundle: Path) -> None:
        with doge_deploy.load(tiny_bundle) as every, doge_deploy.load(last_bundle) as last:
            expected, logits = every.logits(self.IDS), last.logits(np.array(self.IDS))
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)

    def test_where_they_depend_on_calls(self, tiny_moe_bundle: Path) -> None:
        mixing = shared_bundle("doge-tiny-moe")
        with doge_deploy.load(tiny_moe_bundle) as every, doge_deploy.load(mixing) as last:
            assert every.logits(self.IDS).shape == (len(self.IDS), 1024)
            assert last.logits(self.IDS[:1]).shape == (1, 1024)
            with pytest.raises(UsageError, match="routing=reference mixes the tokens of a call: export it with"):
                last.logits(self.IDS)

    @pytest.mark.parametrize("ids", [[], [[1, 2]], [1.5], [-1], [1024], ["a"]], ids=repr)
    def test_ids_that_are_none(self, ids: Any, tiny_bundle: Path) -> None:
        with pytest.raises(UsageError, match="ids "):
            doge_deploy.TextModel(tiny_bundle).logits(ids)


@pytest.mark.parametrize(
    ("keywords", "options"),
    [(api.ExportKeywords, api.ExportOptions), (api.BuildKeywords, api.BuildOptions)],
    ids=["export", "build"],
)
def test_keywords_are_the_fields_of_the_options(keywords: Any, options: Any) -> None:
    types = typing.get_type_hints(keywords)
    assert list(types) == list(options.model_fields)
    for name, field in options.model_fields.items():
        # what is legal in the model is legal as a keyword; a range or a list may also be written shorter there
        wanted = {str(part) for part in typing.get_args(field.annotation) or (field.annotation,)}
        given = {str(part) for part in typing.get_args(types[name]) or (types[name],)}
        assert wanted <= given or typing.get_origin(field.annotation) is tuple, name


def test_choices_are_all_that_a_text_can_be_generated_with() -> None:
    sampling = {spec.name for spec in dataclasses.fields(SamplingOptions)}
    others = {"max_new_tokens", "eos_token_id", "stop_strings", "logprobs"}
    assert set(doge_deploy.TextChoices.__annotations__) == {*sampling, *others}


@pytest.mark.sweep
def test_type_checkers_know_the_functions(tmp_path: Path) -> None:
    right = """import doge_deploy

bundle = doge_deploy.export("doge-tiny", "a", kv_cache=["static"], quantize="int8")
path = bundle.path.name
with doge_deploy.load(bundle.path, defaults={"seed": 1}) as model:
    text: str = model.generate([{"role": "user", "content": "a"}], top_k=5).text
    rows, vocabulary = model.logits([1]).shape
passed: bool = doge_deploy.verify(bundle.path).passed
"""
    wrong = """import doge_deploy

doge_deploy.export("doge-tiny", "a", dtype="fp8")
doge_deploy.load("a").generate("a", top_k="5")
doge_deploy.load("a").generate("a", temprature=1.0)
doge_deploy.exprot("a")
doge_deploy.verify("a").passd
"""
    found = {}
    environment = {**os.environ, "MYPYPATH": str(Path(api.__file__).parent.parent)}
    for name, code in (("right", right), ("wrong", wrong)):
        (tmp_path / f"{name}.py").write_text(code)
        options = ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
        command = [sys.executable, "-m", "mypy", *options, f"{name}.py"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        found[name] = [line.split(":")[1] for line in done.stdout.splitlines() if ": error: " in line]
    assert found == {"right": [], "wrong": ["3", "4", "5", "6", "7"]}
