"""The command `generate` on a bundle whose model is replaced by a script."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from scripted_runner import ScriptedRunner, scripted

import doge_deploy
import doge_deploy.runtime.ort
from doge_deploy.bundle.files import file_entries
from doge_deploy.bundle.manifest import Layout, Manifest
from doge_deploy.bundle.signature import make_signature
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.cli.endings import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED
from doge_deploy.cli.generate import generate
from doge_deploy.cli.main import run_command
from doge_deploy.config.model import DogeFacts
from doge_deploy.errors import BrokenBundleError, DogeDeployError, UsageError
from doge_deploy.options.export import ExportOptions
from doge_deploy.options.resolved import ResolvedOptions
from doge_deploy.runtime.tokenizer import Tokenizer

DOGE_TINY = Path(doge_deploy.__file__).parent / "demo" / "doge-tiny"
MAX_LENGTH = 128
EOT = 5
LETTER_A = 70

Invoke = Callable[..., Result]


def write_bundle(directory: Path, *, without: str = "", **generation: Any) -> Path:
    """A bundle whose graph and weights are empty files. `generation` changes generation_config.json; `without` is left
    out.
    """
    directory.mkdir()
    for file in DOGE_TINY.iterdir():
        if file.suffix != ".safetensors" and file.name != without:
            shutil.copyfile(file, directory / file.name)
    for name in ("model.onnx", "weights.safetensors"):
        (directory / name).touch()
    config = directory / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "do_sample": False, **generation}))
    facts = DogeFacts.from_config(json.loads((DOGE_TINY / "config.json").read_text(encoding="utf-8")))
    signature = make_signature(facts, "static", dtype="float32", max_length=MAX_LENGTH, last_logits=True)
    write_manifest(
        directory,
        Manifest(
            tool={"name": "doge-deploy", "version": "0"},
            libraries={},
            checkpoint={"sha256": "0" * 64, "source": "doge-tiny"},
            facts=facts,
            options=ResolvedOptions.of(ExportOptions(), max_length=MAX_LENGTH),
            layouts={"static": Layout("model.onnx", signature, keep_window=facts.keep_window(MAX_LENGTH))},
            files=file_entries(directory),
        ),
    )
    return directory


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DOGE_TINY)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command; errors come through as they would reach the main program."""

    def run(
        runner: ScriptedRunner | Callable[[], ScriptedRunner],
        *arguments: object,
        charset: str = "utf-8",
        **more: Any,
    ) -> Result:
        def open_scripted(*_: Any, **__: Any) -> ScriptedRunner:
            return runner if isinstance(runner, ScriptedRunner) else runner()

        monkeypatch.setattr(doge_deploy.runtime.ort, "open_runner", open_scripted)
        return CliRunner(charset=charset).invoke(generate, [str(each) for each in arguments], **more)

    return run


def not_loaded() -> ScriptedRunner:
    raise AssertionError("the model was loaded")


def raised(result: Result) -> DogeDeployError:
    assert isinstance(result.exception, DogeDeployError), result.exception
    assert "\n" not in str(result.exception)
    return result.exception


def saying(tokenizer: Tokenizer, prompt: list[int], text: str) -> ScriptedRunner:
    return scripted([*tokenizer.encode(text)[1:], EOT], len(prompt), max_length=MAX_LENGTH)


class TestPrompt:
    def test_text_on_stdout_and_statistics_on_stderr(self, invoke: Invoke, bundle: Path, tokenizer: Tokenizer) -> None:
        prompt = tokenizer.encode("Say")
        runner = saying(tokenizer, prompt, "good 漢字 😀")
        result = invoke(runner, bundle, "--prompt", "Say")
        assert (result.exit_code, result.stdout) == (0, "good 漢字 😀\n")
        assert runner.history[: len(prompt)] == prompt
        line = rf"loaded in \d+ ms, {len(prompt)} prompt tokens, first token after \d+ ms, \d+ tokens at .*/s\n"
        assert re.fullmatch(line, result.stderr), result.stderr

    def test_quiet(self, invoke: Invoke, tmp_path: Path, tokenizer: Tokenizer) -> None:
        bundle = write_bundle(tmp_path / "bundle", num_beams=4)
        runner = saying(tokenizer, tokenizer.encode("Say"), "a")
        result = invoke(runner, bundle, "--prompt", "Say", "--quiet")
        assert (result.stdout, result.stderr) == ("a\n", "")

    def test_settings_that_are_not_done_are_named(self, invoke: Invoke, tmp_path: Path, tokenizer: Tokenizer) -> None:
        bundle = write_bundle(tmp_path / "bundle", num_beams=4)
        result = invoke(saying(tokenizer, tokenizer.encode("Say"), "a"), bundle, "--prompt", "Say")
        assert "generation_config.json asks for num_beams=4" in result.stderr

    @pytest.mark.parametrize(("typed", "read"), [("a\n", "a"), ("a", "a"), ("a\n\n", "a\n"), ("", "")], ids=repr)
    def test_from_standard_input(
        self, invoke: Invoke, bundle: Path, tokenizer: Tokenizer, typed: str, read: str
    ) -> None:
        prompt = tokenizer.encode(read)
        runner = saying(tokenizer, prompt, "b")
        result = invoke(runner, bundle, "--prompt", "-", input=typed)
        assert result.stdout == "b\n" and runner.history[: len(prompt)] == prompt

    def test_stop_and_max_new_tokens(self, invoke: Invoke, bundle: Path, tokenizer: Tokenizer) -> None:
        prompt = tokenizer.encode("Say")
        options = ["--prompt", "Say", "--quiet"]
        result = invoke(saying(tokenizer, prompt, "one. two, three"), bundle, *options, "--stop", ", t", "--stop", "!")
        assert result.stdout == "one. two\n"
        result = invoke(saying(tokenizer, prompt, "漢字"), bundle, *options, "--max-new-tokens", 3)
        assert result.stdout == "漢\n"

    def test_biases_and_penalties(self, invoke: Invoke, bundle: Path) -> None:
        """The script's token leads by 9: what is taken off it, or added to another, decides."""

        def text(*options: object) -> str:
            runner = ScriptedRunner(lambda history: LETTER_A, vocab_size=1024, max_length=MAX_LENGTH)
            return invoke(runner, bundle, "--prompt", "Say", "--max-new-tokens", 6, "--quiet", *options).stdout

        assert text() == "aaaaaa\n"
        assert text("--logit-bias", f"{LETTER_A + 1}=8.5") == "aaaaaa\n"
        assert text("--logit-bias", f"{LETTER_A + 1}=9.5", "--logit-bias", "4=-100") == "bbbbbb\n"
        bias = ("--logit-bias", f"{LETTER_A + 1}=8.5")
        assert text(*bias, "--presence-penalty", 1).startswith("ab")
        assert text("--logit-bias", f"{LETTER_A + 1}=6.5", "--frequency-penalty", 1).startswith("aaab")

    def test_min_p_draws_among_the_likely(self, invoke: Invoke, bundle: Path) -> None:
        runner = ScriptedRunner(lambda history: LETTER_A, vocab_size=1024, max_length=MAX_LENGTH)
        options = ["--temperature", 50, "--top-k", 0, "--top-p", 1, "--max-new-tokens", 20, "--min-p", 0.9]
        assert invoke(runner, bundle, "--prompt", "Say", *options).stdout == "a" * 20 + "\n"

    @pytest.mark.parametrize("quiet", [(), ("--quiet",)], ids=["with statistics", "alone"])
    def test_logprobs_are_lines_of_json(self, invoke: Invoke, bundle: Path, tokenizer: Tokenizer, quiet: Any) -> None:
        runner = saying(tokenizer, tokenizer.encode("Say"), "one two")
        result = invoke(runner, bundle, "--prompt", "Say", "--logprobs", 2, *quiet)
        assert result.stdout == "one two\n"
        lines = result.stderr.splitlines()
        entries = [json.loads(line) for line in (lines if quiet else lines[:-1])]
        assert [entry["token"] for entry in entries] == [*tokenizer.encode("one two")[1:], EOT]
        assert "".join(entry["text"] for entry in entries[:-1]) == "one two"
        assert entries[-1]["text"] == "<|eot_id|>"
        likely = math.log(math.exp(9) / (math.exp(9) + 1023))
        for entry in entries:
            assert entry["logprob"] == pytest.approx(likely)
            best, second = entry["top"]
            assert best == {name: entry[name] for name in ("token", "text", "logprob")}
            assert second["token"] == 0 and second["logprob"] == pytest.approx(likely - 9)

    def test_seed_draws_the_same_text(self, invoke: Invoke, bundle: Path) -> None:
        def text(seed: int) -> str:
            runner = ScriptedRunner(lambda history: LETTER_A, vocab_size=1024, max_length=MAX_LENGTH)
            options = [
                "--temperature",
                50,
                "--top-k",
                0,
                "--top-p",
                1,
                "--max-new-tokens",
                20,
                "--seed",
                seed,
            ]
            return invoke(runner, bundle, "--prompt", "Say", *options).stdout

        assert text(1) == text(1) != text(2)


class TestChat:
    def test_one_turn(self, invoke: Invoke, bundle: Path, tokenizer: Tokenizer) -> None:
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]
        prompt = tokenizer.render_chat(messages)
        runner = saying(tokenizer, prompt, "ho")
        result = invoke(runner, bundle, "--chat", "--prompt", "hi", "--system", "Be short.")
        assert result.stdout == "ho\n" and runner.history[: len(prompt)] == prompt

    def test_conversation_keeps_the_cache(self, invoke: Invoke, bundle: Path, tokenizer: Tokenizer) -> None:
        first = [{"role": "user", "content": "hi"}]
        second = [*first, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"}]
        starts = [len(tokenizer.render_chat(messages)) for messages in (first, second)]
        reply = [*tokenizer.encode("ho")[1:], EOT]

        def rule(history: list[int]) -> int:
            start = max((start for start in starts if len(history) >= start), default=0)
            return reply[min(len(history) - start, len(reply) - 1)] if start else 0

        runner = ScriptedRunner(rule, vocab_size=1024, max_length=MAX_LENGTH)
        result = invoke(runner, bundle, "--chat", input="hi\n\n  and?  \n")
        assert (result.exit_code, result.stdout) == (0, "ho\nho\n")
        assert runner.resets == 1
        assert runner.history[: starts[1]] == tokenizer.render_chat(second)
        loaded, cached = result.stderr.splitlines()
        assert loaded.startswith("loaded in") and f"({starts[0] + len(reply) - 1} cached)" in cached

    def test_end_of_input_ends(self, invoke: Invoke, bundle: Path, tokenizer: Tokenizer) -> None:
        result = invoke(saying(tokenizer, [], "never"), bundle, "--chat", input="")
        assert (result.exit_code, result.output) == (0, "")

    def test_conversation_that_outgrows_the_cache(self, invoke: Invoke, bundle: Path, tokenizer: Tokenizer) -> None:
        runner = ScriptedRunner(lambda history: LETTER_A, vocab_size=1024, max_length=MAX_LENGTH)
        result = invoke(runner, bundle, "--chat", "--max-new-tokens", 500, input="hi\nand?\n")
        assert "max_length is full" in result.stderr
        assert f"max_length is {MAX_LENGTH}" in str(raised(result))


class TestErrors:
    """All of these are found before the model is loaded."""

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ([], "give --prompt"),
            (["--prompt", "a", "--system", "b"], "--chat"),
            (["--prompt", "a", "--greedy", "--top-k", "5", "--top-p", "0.5"], "--top-k 5, --top-p 0.5"),
            (["--prompt", "a", "--temperature", "0"], "temperature=0.0: must be"),
            (["--prompt", "a", "--temperature", "nan"], "temperature=nan: must be"),
            (["--prompt", "a", "--top-p", "2"], "top_p=2.0: must be"),
            (["--prompt", "a", "--seed", "-1"], "seed=-1: must be"),
            (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0: must be"),
            (["--prompt", "a", "--stop", ""], "stop=['']: must be"),
            (["--prompt", "a", "--greedy", "--min-p", "0.1"], "--min-p 0.1 would do nothing"),
            (["--prompt", "a", "--min-p", "-0.5"], "min_p=-0.5: must be"),
            (["--prompt", "a", "--presence-penalty", "2.5"], "presence_penalty=2.5: must be a number from -2 to 2"),
            (["--prompt", "a", "--frequency-penalty", "nan"], "frequency_penalty=nan: must be"),
            (["--prompt", "a", "--logit-bias", "5"], "--logit-bias 5: must be ID=NUMBER"),
            (["--prompt", "a", "--logit-bias", "the=1"], "--logit-bias the=1: must be ID=NUMBER"),
            (["--prompt", "a", "--logit-bias", "5=101"], "logit_bias: 101.0 for token 5: must be"),
            (["--prompt", "a", "--logit-bias", "-5=1"], "logit_bias: -5 is not a token id"),
            (["--prompt", "a", "--logit-bias", "1024=1"], "token 1024 is not in the model's vocabulary of 1024"),
            (["--prompt", "a", "--logprobs", "-1"], "logprobs=-1: must be a whole number from 0"),
            (["--prompt", "漢" * 99], "prompt has 298 tokens and the bundle's max_length is 128"),
            (["--chat", "--prompt", "漢" * 99], "max_length is 128"),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40] or "nothing",
    )
    def test_usage(self, invoke: Invoke, bundle: Path, options: list[str], says: str) -> None:
        error = raised(invoke(not_loaded, bundle, *options))
        assert isinstance(error, UsageError) and says in str(error)

    def test_threads(self, invoke: Invoke, bundle: Path) -> None:
        assert invoke(not_loaded, bundle, "--prompt", "a", "--threads", 0).exit_code == 2

    def test_input_that_is_not_utf8(self, invoke: Invoke, bundle: Path) -> None:
        error = raised(invoke(not_loaded, bundle, "--prompt", "-", input=b"ab\xff"))
        assert isinstance(error, UsageError) and "byte 0xff at position 2" in str(error)

    def test_no_bundle(self, invoke: Invoke, tmp_path: Path) -> None:
        assert isinstance(raised(invoke(not_loaded, tmp_path / "none", "--prompt", "a")), UsageError)

    def test_no_tokenizer(self, invoke: Invoke, tmp_path: Path) -> None:
        bundle = write_bundle(tmp_path / "bundle", without="tokenizer.json")
        error = raised(invoke(not_loaded, bundle, "--prompt", "a"))
        assert isinstance(error, BrokenBundleError) and "tokenizer.json" in str(error)

    @pytest.mark.parametrize("prompt", [[], ["--prompt", "a"]], ids=["conversation", "one turn"])
    def test_no_chat_template(self, invoke: Invoke, tmp_path: Path, prompt: list[str]) -> None:
        bundle = write_bundle(tmp_path / "bundle", without="chat_template.jinja")
        error = raised(invoke(not_loaded, bundle, "--chat", *prompt))
        assert isinstance(error, UsageError) and "chat_template" in str(error)


class TestEnds:
    def test_interrupt(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        def rule(history: list[int]) -> int:
            if len(history) > 8:
                raise KeyboardInterrupt
            return LETTER_A

        runner = ScriptedRunner(rule, vocab_size=1024, max_length=MAX_LENGTH)
        monkeypatch.setattr(doge_deploy.runtime.ort, "open_runner", lambda *_, **__: runner)
        assert run_command(["generate", str(bundle), "--prompt", "Say"]) == EXIT_INTERRUPTED
        said = capfd.readouterr()
        assert (said.err, set(said.out)) == ("\ndoge-deploy: interrupted\n", {"a"})

    def test_reader_that_goes_away(self, bundle: Path) -> None:
        script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import doge_deploy.runtime.ort as ort
from scripted_runner import ScriptedRunner
runner = ScriptedRunner(lambda history: {LETTER_A}, vocab_size=1024, max_length={MAX_LENGTH})
ort.open_runner = lambda *_, **__: runner
from doge_deploy.cli.main import main
main(["generate", "--prompt", "Say", {str(bundle)!r}])
"""
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == EXIT_BROKEN_PIPE

    def test_terminal_that_cannot_show_a_character(self, invoke: Invoke, bundle: Path, tokenizer: Tokenizer) -> None:
        runner = saying(tokenizer, tokenizer.encode("Say"), "a漢b")
        result = invoke(runner, bundle, "--prompt", "Say", charset="ascii")
        assert (result.exit_code, result.stdout_bytes) == (0, b"a?b\n")
