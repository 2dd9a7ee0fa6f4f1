"""The loop, stop strings, options and measurements, on a runner without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_runner import ScriptedRunner, scripted

import doge_deploy
from doge_deploy.errors import UsageError
from doge_deploy.options.generation import (
    DEFAULT_MAX_NEW_TOKENS,
    GenerationOptions,
    SamplingOptions,
    illegal_settings,
    settings_not_done,
)
from doge_deploy.runtime.generate import Statistics, StopStrings, TextGenerator, check_prompt, generate
from doge_deploy.runtime.sampling import Sampler
from doge_deploy.runtime.tokenizer import Tokenizer

DOGE_TINY = Path(doge_deploy.__file__).parent / "demo" / "doge-tiny"
EOS, EOT = 1, 5
GREEDY = SamplingOptions()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DOGE_TINY)


def counting(**more: Any) -> ScriptedRunner:
    """Says one more than the last token."""
    return ScriptedRunner(lambda history: (history[-1] + 1) % 100, vocab_size=100, **more)


def run(runner: ScriptedRunner, prompt: list[int], **more: Any) -> list[int]:
    more.setdefault("max_new_tokens", 5)
    return list(generate(runner, prompt, Sampler(GREEDY), **more))


class TestLoop:
    def test_prefill_then_single_tokens(self) -> None:
        runner = counting()
        assert run(runner, [10, 20, 30]) == [31, 32, 33, 34, 35]
        assert runner.calls == [[10, 20, 30], [31], [32], [33], [34]]

    def test_the_last_token_is_not_fed(self) -> None:
        runner = counting()
        run(runner, [1], max_new_tokens=1)
        assert runner.calls == [[1]] and runner.row_lengths.tolist() == [1]

    @pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 8])
    @pytest.mark.parametrize("last", [True, False], ids=["last logits", "all logits"])
    def test_chunked_prefill(self, chunk: int, last: bool) -> None:
        prompt = [3, 1, 4, 1, 5, 9, 2]
        runner = counting(last=last)
        assert run(runner, prompt, prefill_chunk=chunk) == [3, 4, 5, 6, 7]
        chunks = [prompt[start : start + chunk] for start in range(0, len(prompt), chunk)]
        assert runner.calls == [*chunks, [3], [4], [5], [6]]

    @pytest.mark.parametrize("eos_ids", [{13}, {13, 99}, [40, 13]], ids=str)
    def test_eos_is_given_out_and_ends(self, eos_ids: Any) -> None:
        assert run(counting(), [10], eos_ids=eos_ids) == [11, 12, 13]

    def test_eos_in_the_prompt_does_not_end(self) -> None:
        assert run(counting(), [13, 10], eos_ids={13}, max_new_tokens=2) == [11, 12]

    @pytest.mark.parametrize("length", [1, 5, 7, 8])
    def test_a_full_row_ends(self, length: int) -> None:
        runner = counting(max_length=8)
        tokens = run(runner, [0] * length, max_new_tokens=50)
        assert len(tokens) == 8 - length + 1
        assert runner.row_lengths.tolist() == [8]

    def test_a_token_is_given_out_before_the_next_is_computed(self) -> None:
        runner = counting()
        tokens = generate(runner, [1], Sampler(GREEDY), max_new_tokens=9)
        assert next(tokens) == 2 and len(runner.calls) == 1
        assert next(tokens) == 3 and len(runner.calls) == 2

    def test_each_text_starts_with_an_empty_row(self) -> None:
        runner = counting()
        assert run(runner, [1]) == run(runner, [1])
        assert runner.resets == 2

    def test_repetition_penalty_sees_prompt_and_output(self) -> None:
        def rule(history: list[int]) -> int:
            return 3

        sampler = Sampler(SamplingOptions(repetition_penalty=1e6))
        runner = ScriptedRunner(rule, vocab_size=4)
        # 3 is the likeliest until it was said; afterwards all that is left to choose from has a logit of 0.
        assert list(generate(runner, [1], sampler, max_new_tokens=2)) == [3, 3]
        seen: list[list[int]] = []

        class Watching(Sampler):
            def pick(self, logits: Any, context: Any) -> int:
                seen.append(list(context))
                return super().pick(logits, context)

        list(generate(runner, [1, 2], Watching(GREEDY), max_new_tokens=3))
        assert seen == [[1, 2], [1, 2, 3], [1, 2, 3, 3]]

    def test_cached_beginning_is_not_fed_again(self) -> None:
        runner = counting()
        run(runner, [1, 2], max_new_tokens=3)
        runner.calls.clear()
        assert run(runner, [1, 2, 3, 4, 50, 60], cached=4, max_new_tokens=2) == [61, 62]
        assert runner.calls == [[50, 60], [61]] and runner.resets == 1

    @pytest.mark.parametrize("cached", [1, 3])
    def test_cached_must_be_what_the_runner_holds(self, cached: int) -> None:
        runner = counting()
        run(runner, [1, 2], max_new_tokens=1)
        with pytest.raises(UsageError, match=f"cached={cached}"):
            generate(runner, [1, 2, 3], Sampler(GREEDY), max_new_tokens=1, cached=cached)

    def test_prompt_too_long(self) -> None:
        with pytest.raises(UsageError, match=r"9 tokens and the bundle's max_length is 8.*--max-length"):
            run(counting(max_length=8), [0] * 9)

    @pytest.mark.parametrize(
        ("prompt", "more", "says"),
        [
            ([], {}, "prompt is empty"),
            ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
            ([1], {"prefill_chunk": 0}, "prefill_chunk=0"),
        ],
        ids=["empty prompt", "no tokens", "no chunk"],
    )
    def test_errors_come_before_the_first_token_is_asked_for(
        self, prompt: list[int], more: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(UsageError, match=says):
            generate(counting(), prompt, Sampler(GREEDY), **{"max_new_tokens": 1, **more})

    def test_check_prompt_passes_a_prompt_that_fills_the_row(self) -> None:
        check_prompt([0] * 8, 8)


def cut(text: str, places: list[int]) -> list[str]:
    """`text` in pieces, some of them empty."""
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def filtered(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    stop = StopStrings(stops)
    text = "".join(stop.push(piece) for piece in pieces) + stop.flush()
    return text, stop.stopped


class TestStopStrings:
    LETTERS = st.text("ab\n", max_size=30)
    STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)

    @settings(deadline=None)
    @given(LETTERS, STOPS, st.lists(st.integers(0, 99)))
    def test_pieces_do_not_matter(self, text: str, stops: list[str], places: list[int]) -> None:
        out, stopped = filtered(stops, cut(text, places))
        assert (out, stopped) == filtered(stops, list(text))
        assert stopped == any(stop in text for stop in stops)
        assert not any(stop in out for stop in stops)
        assert text.startswith(out) and (stopped or out == text)

    @settings(deadline=None)
    @given(LETTERS, STOPS)
    def test_holds_back_no_more_than_it_must(self, text: str, stops: list[str]) -> None:
        stop, out = StopStrings(stops), ""
        for end, letter in enumerate(text, start=1):
            out += stop.push(letter)
            held = text[len(out) : end]
            if stop.stopped:
                break
            assert not held or any(other.startswith(held) for other in stops)

    @pytest.mark.parametrize(
        ("stops", "pieces", "out"),
        [
            (["END"], ["one E", "N", "D two"], ["one ", "", ""]),
            (["END"], ["one E", "N", "O"], ["one ", "", "ENO"]),
            (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
            (["\n\n"], ["a\n", "b\n", "\n"], ["a", "\nb", ""]),
            (["bc", "abcd"], ["abcd"], ["a"]),
            (["bc", "abc"], ["abc"], [""]),
            ([], ["a", "b"], ["a", "b"]),
            (["漢字"], ["漢", "漢", "字"], ["", "漢", ""]),
        ],
        ids=["found", "not after all", "overlap", "lines", "first complete", "longest", "none", "chinese"],
    )
    def test_what_comes_out_when(self, stops: list[str], pieces: list[str], out: list[str]) -> None:
        stop = StopStrings(stops)
        assert [stop.push(piece) for piece in pieces] == out

    def test_the_end_gives_out_what_was_held(self) -> None:
        stop = StopStrings(["END"])
        assert (stop.push("one EN"), stop.flush(), stop.flush()) == ("one ", "EN", "")

    def test_nothing_after_the_stop(self) -> None:
        stop = StopStrings(["."])
        assert [stop.push("a.b"), stop.push("c"), stop.flush()] == ["a", "", ""]


class TestOptions:
    def test_of_the_demo(self) -> None:
        config = json.loads((DOGE_TINY / "generation_config.json").read_text(encoding="utf-8"))
        options = GenerationOptions.merged(config)
        assert options.sampling == SamplingOptions(do_sample=True, temperature=0.8, top_k=50, top_p=0.9)
        assert options.max_new_tokens == 100 and options.eos_ids == {EOS, EOT} and options.stop == ()

    def test_of_nothing(self) -> None:
        assert GenerationOptions.merged({}) == GenerationOptions(max_new_tokens=DEFAULT_MAX_NEW_TOKENS)

    def test_later_layers_win_where_they_are_set(self) -> None:
        options = GenerationOptions.merged(
            {"eos_token_id": 1, "max_new_tokens": 7},
            {"do_sample": True, "temperature": 0.5, "top_k": 3, "eos_token_id": None},
            {"temperature": 0.9, "top_k": None, "stop_strings": ("x",), "seed": 4},
        )
        assert options.sampling == SamplingOptions(True, 0.9, 3, seed=4)
        assert options.max_new_tokens == 7 and options.eos_ids == {1} and options.stop == ("x",)

    @pytest.mark.parametrize("eos", [5, [5], [5, 1]], ids=str)
    def test_eos_is_an_id_or_a_list(self, eos: Any) -> None:
        assert 5 in GenerationOptions.merged({"eos_token_id": eos}).eos_ids

    def test_stop_string_alone(self) -> None:
        assert GenerationOptions.merged({"stop_strings": "ab"}).stop == ("ab",)

    def test_without_sampling_its_settings_are_not_looked_at(self) -> None:
        options = GenerationOptions.merged({"do_sample": False, "temperature": 0.0, "repetition_penalty": 1.5})
        assert options.sampling == SamplingOptions(repetition_penalty=1.5)

    @pytest.mark.parametrize(
        "config",
        [
            {"max_new_tokens": 0},
            {"max_new_tokens": 1.5},
            {"eos_token_id": "</s>"},
            {"eos_token_id": [[1]]},
            {"stop_strings": [""]},
            {"stop_strings": 3},
            {"do_sample": True, "temperature": 0.0},
            {"do_sample": "yes"},
            {"logprobs": -1},
            {"logprobs": 1.5},
        ],
        ids=json.dumps,
    )
    def test_illegal(self, config: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="must be") as error:
            GenerationOptions.merged(config)
        assert "\n" not in str(error.value)

    def test_a_file_says_what_transformers_reads_there_and_nothing_else(self) -> None:
        from transformers import GenerationConfig

        known = vars(GenerationConfig())
        file = {
            "do_sample": True,
            "min_p": 0.25,
            "presence_penalty": 9,
            "frequency_penalty": "x",
            "logit_bias": {"5": 1},
        }
        file |= {"seed": -1, "logprobs": "many"}
        assert {name for name in file if name in known} == {"do_sample", "min_p"}
        assert illegal_settings(file) == ()
        options = GenerationOptions.with_file(file, {}, eos_ids=(), source="file", vocab_size=9)
        assert options == GenerationOptions(SamplingOptions(do_sample=True, min_p=0.25))
        asked = {"min_p": 0.5, "presence_penalty": 1.0, "logit_bias": {8: 1.0}, "logprobs": 3, "seed": 4}
        options = GenerationOptions.with_file(file, asked, eos_ids=(), source="file", vocab_size=9)
        sampling = SamplingOptions(True, min_p=0.5, presence_penalty=1.0, logit_bias={8: 1.0}, seed=4)
        assert options == GenerationOptions(sampling, logprobs=3)

    def test_a_bias_of_a_token_that_is_none(self) -> None:
        with pytest.raises(UsageError, match="logit_bias: token 9 is not in the model's vocabulary of 9"):
            GenerationOptions.with_file({}, {"logit_bias": {9: 1.0}}, eos_ids=(), source="file", vocab_size=9)

    def test_settings_that_are_not_done_are_named(self) -> None:
        config = {"num_beams": 4, "top_h": 0.05, "typical_p": 1.0, "min_length": None, "temperature": 0.5}
        assert settings_not_done(config) == ("num_beams=4", "top_h=0.05")

    def test_defaults_of_transformers_are_all_done(self) -> None:
        from transformers import GenerationConfig

        defaults = GenerationConfig._get_default_generation_params()
        assert settings_not_done(defaults) == ()
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        assert SamplingOptions() == SamplingOptions(**{name: defaults[name] for name in names})


class TestText:
    PROMPT = (0, 42)

    def texts(self, tokenizer: Tokenizer, text: str, *, end: int = EOS, **options: Any) -> tuple[list[str], Any]:
        """Pieces and statistics of a model that says `text`, then `end`."""
        runner = scripted([*tokenizer.encode(text)[1:], end], len(self.PROMPT))
        merged = GenerationOptions.merged({"eos_token_id": [EOS, EOT]}, options)
        stream = TextGenerator(runner, tokenizer, merged).stream(self.PROMPT)
        pieces = list(stream)
        assert stream.text == "".join(pieces) and all(pieces)
        return pieces, stream.statistics

    @pytest.mark.parametrize("end", [EOS, EOT], ids=["eos", "end of turn"])
    def test_until_eos(self, tokenizer: Tokenizer, end: int) -> None:
        pieces, statistics = self.texts(tokenizer, "an import 漢字 😀!", end=end)
        assert "".join(pieces) == "an import 漢字 😀!" and {"漢", "😀"} <= {piece.strip() for piece in pieces}
        assert statistics.finish_reason == "eos"
        assert statistics.new_tokens == len(tokenizer.encode("an import 漢字 😀!"))

    def test_stop_string(self, tokenizer: Tokenizer) -> None:
        pieces, statistics = self.texts(tokenizer, "one. two. three", stop_strings=[". t"])
        assert "".join(pieces) == "one" and statistics.finish_reason == "stop"

    def test_stop_string_that_does_not_come(self, tokenizer: Tokenizer) -> None:
        pieces, statistics = self.texts(tokenizer, "one. tw", stop_strings=[". two"])
        assert "".join(pieces) == "one. tw" and statistics.finish_reason == "eos"

    def test_max_new_tokens_within_a_character(self, tokenizer: Tokenizer) -> None:
        pieces, statistics = self.texts(tokenizer, "漢字", max_new_tokens=5)
        assert pieces == ["漢", "\ufffd"] and statistics.finish_reason == "max_new_tokens"

    def test_full_row(self, tokenizer: Tokenizer) -> None:
        _, statistics = self.texts(tokenizer, "漢" * 40, max_new_tokens=500)
        assert statistics.finish_reason == "max_length"
        assert statistics.line().endswith("ended because max_length is full")


class TestCacheBetweenTurns:
    OPTIONS = GenerationOptions(max_new_tokens=3, eos_ids=frozenset({99}))

    def test_a_prompt_that_continues_the_text_is_fed_from_there(self, tokenizer: Tokenizer) -> None:
        runner = counting()
        generator = TextGenerator(runner, tokenizer, self.OPTIONS)
        list(generator.stream([10, 11]))
        runner.calls.clear()
        stream = generator.stream([10, 11, 12, 13, 14, 50])
        list(stream)
        # 14 was the last token that came out, and had not been fed.
        assert runner.calls == [[14, 50], [51], [52]] and runner.resets == 1
        assert (stream.statistics.prompt_tokens, stream.statistics.cached_tokens) == (6, 4)

    @pytest.mark.parametrize(
        "prompt",
        [[10, 11, 12, 77, 1], [10, 11, 12, 13], [10, 11], [5]],
        ids=["other", "same", "shorter", "new"],
    )
    def test_any_other_prompt_is_fed_from_the_start(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        runner = counting()
        generator = TextGenerator(runner, tokenizer, self.OPTIONS)
        list(generator.stream([10, 11]))
        runner.calls.clear()
        stream = generator.stream(prompt)
        list(stream)
        assert runner.calls[0] == prompt and runner.resets == 2
        assert stream.statistics.cached_tokens == 0

    def test_after_a_stream_that_was_left(self, tokenizer: Tokenizer) -> None:
        runner = counting()
        generator = TextGenerator(runner, tokenizer, self.OPTIONS)
        next(generator.stream([40]))
        list(generator.stream([40, 41, 7]))
        assert runner.calls == [[40], [41, 7], [8], [9]]


class TestStatistics:
    @pytest.mark.parametrize(
        ("statistics", "line"),
        [
            (
                Statistics(12, 0, 65, 35.2, 156.0),
                "12 prompt tokens, first token after 35 ms, 65 tokens at 410.3 tok/s",
            ),
            (Statistics(1, 0, 1, 5.0), "1 prompt token, first token after 5 ms, 1 token"),
            (
                Statistics(9, 4, 2, 5.0, 2.0),
                "9 prompt tokens (4 cached), first token after 5 ms, 2 tokens at 500.0 tok/s",
            ),
        ],
        ids=["many", "one", "cached"],
    )
    def test_line(self, statistics: Statistics, line: str) -> None:
        assert statistics.line() == line
        assert statistics.line(load_ms=81.6) == f"loaded in 82 ms, {line}"

    def test_rate_leaves_the_first_token_out(self) -> None:
        statistics = Statistics(3)
        assert statistics.decode_tokens_per_s is None
        for elapsed_ms in (100.0, 10.0, 30.0):
            statistics.add_token(elapsed_ms)
        assert statistics.first_token_ms == 100.0
        assert statistics.line().endswith("3 tokens at 50.0 tok/s")


def test_without_torch_and_transformers() -> None:
    """The loop, the tokenizer and the command, in a process where neither can be imported."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
for name in ("torch", "transformers", "onnxscript", "doge_deploy.graph", "doge_deploy.model"):
    sys.modules[name] = None
import doge_deploy.cli.generate
assert "numpy" not in sys.modules and "tokenizers" not in sys.modules and "onnxruntime" not in sys.modules
import doge_deploy.runtime.ort
from doge_deploy.options.generation import GenerationOptions
from doge_deploy.runtime.generate import TextGenerator
from doge_deploy.runtime.tokenizer import Tokenizer
from scripted_runner import scripted
tokenizer = Tokenizer.from_directory({str(DOGE_TINY)!r})
prompt = tokenizer.render_chat([{{"role": "user", "content": "hi"}}])
runner = scripted([*tokenizer.encode("good 漢字")[1:], 1], len(prompt))
options = GenerationOptions.merged({{"eos_token_id": 1}})
sys.stdout.buffer.write("".join(TextGenerator(runner, tokenizer, options).stream(prompt)).encode())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stdout.decode()) == (0, "good 漢字"), done.stderr.decode()


GENERATE_WITHOUT = """
import sys

for name in ("onnx", "onnx_ir", "torch", "transformers", "pydantic", "huggingface_hub"):
    sys.modules[name] = None  # importing it is an error
from doge_deploy.cli.main import run_command

sys.exit(run_command(["generate", sys.argv[1], "--prompt", "The", "--max-new-tokens", "2"]))
"""


def test_a_bundle_is_served_by_the_base_installation(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", GENERATE_WITHOUT, str(tiny_bundle)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
