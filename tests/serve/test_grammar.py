"""Grammars that anybody may send: none of them ends the server or holds up anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import NAME, Running, of_bundle, running

from doge_deploy.errors import BrokenBundleError, DogeDeployError, UsageError
from doge_deploy.process.child import Child
from doge_deploy.serve.engine import EngineStoppedError
from doge_deploy.serve.grammar import desk as desk_module
from doge_deploy.serve.grammar import worker
from doge_deploy.serve.grammar.compiler import GrammarCompiler
from doge_deploy.serve.grammar.desk import GrammarDesk
from doge_deploy.serve.grammar.matchers import Kind
from doge_deploy.serve.grammar.trial import Trial
from doge_deploy.serve.scheduler import QueueFullError

VOCAB, EOS = 1024, [1]

DEEP = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3000)) + 'r3000: "a"\n'
"""Overflows a stack of 8 MiB when it is compiled."""

ENDLESS = "start: T\nT: " + " & ".join(f"/(?s:.*)a{i}(?s:.*)/" for i in range(40))
"""The time for it grows fivefold with two terms, and the memory too."""

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory, and ends of parents, are Linux's")


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars wait for others as long as a busy machine takes."""
    monkeypatch.setattr(desk_module, "WAIT_SECONDS", 600.0)


@pytest.fixture
def trial(tiny_bundle: Path) -> Iterator[Trial]:
    found = Trial(tiny_bundle / "tokenizer.json", VOCAB, EOS, seconds=60)
    yield found
    found.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # it was waited for meanwhile
        return True


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_grammar_that_becomes_too_complex_is_an_error_of_its_text(tiny_bundle: Path) -> None:
    """With llguidance's own limits it takes seconds for a token, in which nobody else gets one."""
    grammar = GrammarCompiler(tiny_bundle / "tokenizer.json", VOCAB, EOS).compile("regex", "(a{1000}){1000}")
    with pytest.raises(UsageError, match="structured output failed"):
        for _ in range(20):
            grammar.accept(int(np.argmax(grammar.allow(np.zeros(VOCAB, np.float32)))))


class TestTrial:
    def test_what_is_sound_passes_in_one_process(self, trial: Trial) -> None:
        assert trial.pid is None
        trial.compile("regex", "[0-9]+")
        first = trial.pid
        trial.compile("choice", '["a", "b"]')
        assert first is not None and trial.pid == first

    def test_what_is_not_valid_is_told_by_the_library(self, trial: Trial) -> None:
        with pytest.raises(UsageError, match="unclosed group"):
            trial.compile("regex", "(")
        assert trial.pid is not None  # it goes on

    def test_a_deep_grammar_is_refused_and_the_next_one_is_not(self, trial: Trial) -> None:
        with pytest.raises(UsageError, match="more stack or memory"):
            trial.compile("grammar", DEEP)
        assert trial.pid is None
        trial.compile("regex", "a")

    def test_one_that_takes_long_is_refused_and_the_next_one_is_not(self, trial: Trial) -> None:
        trial.compile("regex", "a")
        pid = trial.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # it would never answer
        trial._seconds = 0.1
        with pytest.raises(UsageError, match=r"longer than 0\.1 s"):
            trial.compile("regex", "b")
        assert trial.pid is None and gone(pid)
        trial._seconds = 60
        trial.compile("regex", "b")

    @LINUX
    def test_one_that_takes_memory_is_refused(self, trial: Trial) -> None:
        with pytest.raises(UsageError, match="more stack or memory"):
            trial.compile("grammar", ENDLESS)

    def test_close_does_not_wait_for_a_compilation(self, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
        trial.compile("regex", "a")
        pid = trial.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # it would never answer
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(trial.compile, "regex", "b")
            wait_for(trial._lock.locked)
            trial.close()
            with pytest.raises(EngineStoppedError):
                waiting.result()
        assert gone(pid)
        with pytest.raises(EngineStoppedError):
            trial.compile("regex", "a")

    def test_signals_of_the_server_are_not_its_own(self, trial: Trial) -> None:
        trial.compile("regex", "a")
        pid = trial.pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        trial.compile("regex", "b")
        assert trial.pid == pid

    def test_a_process_that_was_ended_from_outside_is_no_fault_of_the_next_grammar(self, trial: Trial) -> None:
        trial.compile("regex", "a")
        child, pid = trial._child, trial.pid
        assert child is not None and pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not child.running)  # when its last thread has ended, which is later than its first
        trial.compile("regex", "b")
        assert trial.pid != pid

    @LINUX
    def test_it_ends_with_the_server_whatever_it_does(self, tiny_bundle: Path) -> None:
        script = (
            "import sys, threading\nfrom pathlib import Path\nfrom doge_deploy.serve.grammar.trial import Trial\n"
            f"trial = Trial(Path({str(tiny_bundle / 'tokenizer.json')!r}), {VOCAB}, {EOS}, seconds=600)\n"
            "trial.compile('regex', 'a')\nprint(trial.pid, flush=True)\nsys.stdin.read()\n"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as server:
            assert server.stdin is not None and server.stdout is not None
            pid = int(server.stdout.readline())
            os.kill(pid, signal.SIGSTOP)  # it does not notice the end of its input
            server.kill()
        try:
            wait_for(lambda: gone(pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def test_it_ends_when_its_input_does_whatever_it_compiles(self, trial: Trial) -> None:
        """Where Linux does not end it with the server."""
        code = f"import {worker.__name__} as worker; worker.MEMORY_BYTES = 2**31; worker.main()"
        with Child([sys.executable, "-c", code, trial._command[-1]]) as child:
            assert child.receive(60) == {"ready": True}
            child.send({"kind": "grammar", "text": ENDLESS})
            child.finish(60)

    @LINUX
    @pytest.mark.parametrize("said", [None, "7 5 3 1 0 0 0"])
    def test_where_its_memory_is_not_known_it_has_no_limit(
        self, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import resource

        before = resource.getrlimit(resource.RLIMIT_DATA)
        monkeypatch.setattr(worker, "_STATM", tmp_path / "statm")
        if said is not None:
            (tmp_path / "statm").write_text(said)
        worker._limit_memory()
        assert resource.getrlimit(resource.RLIMIT_DATA) == before

    def test_a_tokenizer_that_cannot_be_read_is_a_broken_bundle(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{}")
        broken = Trial(tmp_path / "tokenizer.json", VOCAB, EOS)
        with pytest.raises(BrokenBundleError, match=r"tokenizer\.json"):
            broken.compile("regex", "a")
        assert broken.pid is None

    def test_a_process_that_cannot_be_started_is_said(self, trial: Trial) -> None:
        trial._command = ["/nowhere"]
        with pytest.raises(DogeDeployError, match="cannot be started"):
            trial.compile("regex", "a")

    def test_its_process_imports_little(self) -> None:
        heavy = {"numpy", "fastapi", "pydantic", "onnxruntime"}
        code = f"import sys, {worker.__name__}; print(*{heavy} & {{*sys.modules}})"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


class ScriptedTrial(Trial):
    """Tries nothing; counts, and waits where it is told to."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.ended = False

    def compile(self, kind: Kind, text: str) -> None:
        self.tried.append(text)
        self.go.wait()
        if self.ended:
            raise EngineStoppedError("the server is shutting down")

    def close(self) -> None:
        self.ended = True
        self.go.set()


@pytest.fixture
def scripted(tiny_bundle: Path) -> Iterator[tuple[GrammarDesk, ScriptedTrial]]:
    trial = ScriptedTrial()
    compiler = GrammarCompiler(tiny_bundle / "tokenizer.json", VOCAB, EOS)
    desk = GrammarDesk(lambda: compiler, trial)
    yield desk, trial
    desk.close()


class TestDesk:
    def test_the_last_grammars_are_remembered(self, scripted: tuple[GrammarDesk, ScriptedTrial]) -> None:
        desk, trial = scripted
        first = asyncio.run(desk.compile("regex", "a"))
        assert asyncio.run(desk.compile("regex", "a")) is first and trial.tried == ["a"]
        assert asyncio.run(desk.compile("grammar", 'start: "a"')) is not first
        for number in range(desk_module.REMEMBERED):
            asyncio.run(desk.compile("regex", f"b{number}"))
        del trial.tried[:]
        asyncio.run(desk.compile("regex", f"b{desk_module.REMEMBERED - 1}"))
        asyncio.run(desk.compile("regex", "a"))
        assert trial.tried == ["a"]

    def test_refusals_are_remembered(self, scripted: tuple[GrammarDesk, ScriptedTrial]) -> None:
        desk, trial = scripted
        for _ in range(2):
            with pytest.raises(UsageError, match="unclosed group"):
                asyncio.run(desk.compile("regex", "("))
        assert trial.tried == ["("]

    def test_not_more_is_remembered_than_fits(self, scripted: tuple[GrammarDesk, ScriptedTrial]) -> None:
        desk, trial = scripted
        long = [f"{number}|" + "a" * (desk_module.REMEMBERED_CHARACTERS // 4 - 10) for number in range(5)]
        for text in [*long, long[4], long[0]]:
            asyncio.run(desk.compile("regex", text))
        assert [text[0] for text in trial.tried] == ["0", "1", "2", "3", "4", "0"]

    def test_two_that_want_the_same_at_once_share_one_trial(self, scripted: tuple[GrammarDesk, ScriptedTrial]) -> None:
        desk, trial = scripted

        async def both() -> list[Any]:
            return await asyncio.gather(desk.compile("regex", "a"), desk.compile("regex", "a"))

        first, second = asyncio.run(both())
        assert first is second and trial.tried == ["a"]

    def test_who_has_waited_too_long_is_told_that_the_server_is_busy(
        self, scripted: tuple[GrammarDesk, ScriptedTrial], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk, trial = scripted
        monkeypatch.setattr(desk_module, "WAIT_SECONDS", -1.0)
        with pytest.raises(QueueFullError):
            asyncio.run(desk.compile("regex", "a"))
        monkeypatch.undo()
        asyncio.run(desk.compile("regex", "a"))  # that was not remembered
        assert trial.tried == ["a"]

    def test_what_passes_the_trial_has_four_times_its_stack(
        self, scripted: tuple[GrammarDesk, ScriptedTrial], tiny_bundle: Path
    ) -> None:
        """500 rules, one in the other, take 1.5 MiB: some systems give no thread more than 1."""
        desk, _ = scripted
        assert desk_module.STACK_BYTES >= 4 * worker.STACK_BYTES
        text = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(500)) + 'r500: "a"\n'
        trial = Trial(tiny_bundle / "tokenizer.json", VOCAB, EOS, seconds=60)
        trial.compile("grammar", text)
        trial.close()
        before = threading.stack_size()
        assert asyncio.run(desk.compile("grammar", text)) and threading.stack_size() == before


@pytest.fixture(scope="module")
def server(tiny_bundle_last: Path) -> Iterator[Running]:
    with running(of_bundle(tiny_bundle_last, slots=2, names=(NAME,))) as found:
        yield found


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}

GUIDES: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"structured_outputs": {"regex": "[ab]c"}}, "structured_outputs.regex", ("ac", "bc")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "structured_outputs.choice", ("yes", "no")),
    ({"structured_outputs": {"grammar": 'start: "x" | "y"'}}, "structured_outputs.grammar", ("x", "y")),
    ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", ('{"a": true}', '{"a": false}')),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "structured_outputs.json", ('{"a": true}', '{"a": false}')),
    (
        {"structured_outputs": {"json": SCHEMA, "regex": None}},
        "structured_outputs.json",
        ('{"a": true}', '{"a": false}'),
    ),
    ({"guided_json": json.dumps(SCHEMA)}, "guided_json", ('{"a": true}', '{"a": false}')),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "structured_outputs.regex", ("a",)),
]

OVERLAPPING = {"oneOf": [{"type": "integer"}, {"type": "number"}]}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_grammar": 'start: "a" ~'}, "guided_grammar", "Expected value"),
    ({"guided_grammar": DEEP}, "guided_grammar", "more stack or memory"),
    ({"guided_grammar": ENDLESS}, "guided_grammar", "make it simpler"),
    ({"guided_regex": "a" * 70_000}, "guided_regex", "at most 65536"),
    ({"guided_regex": "\ud800"}, "guided_regex", "string"),
    ({"guided_choice": ["\ud800"]}, "guided_choice.0", "string"),
    ({"guided_json": {"type": "nonsense"}}, "guided_json", "nonsense"),
    ({"guided_json": "[1]"}, "guided_json", "must be a JSON object"),
    ({"guided_json": "{"}, "guided_json", "is not JSON"),
    ({"guided_json": 5}, "guided_json", "must be a JSON object, or one as a text; not 5"),
    ({"guided_json": '{"a":' * 20_000}, "guided_json", "characters; at most"),
    ({"guided_json": '{"a":' * 10_000}, "guided_json", "nested too deeply"),
    ({"guided_json": {"dependentRequired": {"a": ["b"]}}}, "guided_json", "dependentRequired"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": OVERLAPPING}}},
        "response_format",
        "use anyOf",
    ),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
    ({"structured_outputs": {"json": {"allOf": [{"type": "x"}]}}}, "structured_outputs.json", "Invalid type"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is not JSON"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex, choice and grammar"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "must not be empty"),
    ({"structured_outputs": {"choice": ["a"] * 4097}}, "structured_outputs.choice", "at most 4096"),
    *[
        ({"structured_outputs": {"regex": "a", name: value}}, f"structured_outputs.{name}", "not supported")
        for name, value in (
            ("json_object", True),
            ("structural_tag", "{}"),
            ("whitespace_pattern", " "),
            ("disable_any_whitespace", True),
            ("disable_additional_properties", True),
            ("disable_fallback", False),
        )
    ],
]


class TestHttp:
    @pytest.mark.parametrize(("guide", "field", "legal"), GUIDES, ids=[str(case[0])[:60] for case in GUIDES])
    def test_what_is_said_is_followed(
        self, server: Running, guide: dict[str, Any], field: str, legal: tuple[str, ...]
    ) -> None:
        for path, prompt in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": MESSAGES})):
            choice = server.post(path, **prompt, max_tokens=60, temperature=1.0, seed=3, **guide)["choices"][0]
            assert (choice["text"] if "prompt" in prompt else choice["message"]["content"]) in legal

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("guide", "field", "named"), REFUSED, ids=[str(case[0])[:60] for case in REFUSED])
    def test_what_cannot_be_followed_is_refused_by_the_name_of_its_field(
        self, server: Running, guide: dict[str, Any], field: str, named: str, stream: bool
    ) -> None:
        response = server.client.post(
            "/v1/completions",
            content=json.dumps({"prompt": "a", "stream": stream, **guide}),
            headers={"Content-Type": "application/json"},
        )
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == field
        assert error["message"].startswith(f"{field}: ") and named in error["message"]

    def test_two_fields_that_say_it_are_refused(self, server: Running) -> None:
        for other in ({"guided_regex": "a"}, {"response_format": {"type": "json_object"}}):
            error = server.post("/v1/completions", 400, prompt="a", structured_outputs={"choice": ["a"]}, **other)[
                "error"
            ]
            assert error["param"] == "structured_outputs"
            assert f"{next(iter(other))} is given too, and they cannot both" in error["message"]

    def test_as_many_choices_as_are_taken_can_be_followed(self, server: Running) -> None:
        """Of alternatives of a rule llguidance follows 2,000, and says so in the middle of the text."""
        choices = [f"c{number}" for number in range(4096)]
        options = {"prompt": "x", "max_tokens": 40, "temperature": 1.0, "seed": 1, "guided_choice": choices}
        assert server.post("/v1/completions", **options)["choices"][0]["text"] in choices
        chunks = server.stream("/v1/completions", **options)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) in choices

    def test_a_choice_may_begin_another(self, server: Running) -> None:
        found = {
            server.post("/v1/completions", prompt="x", temperature=2.0, seed=seed, guided_choice=["a", "ab", "abc"])[
                "choices"
            ][0]["text"]
            for seed in range(12)
        }
        assert found <= {"a", "ab", "abc"}

    def test_the_schema_says_what_is_taken(self, server: Running) -> None:
        schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
        assert set(schemas["StructuredOutputs"]["properties"]) == {"json", "regex", "choice", "grammar"}

    def test_nothing_is_started_where_nobody_asks(self, tiny_bundle_last: Path) -> None:
        before = children()
        with running(of_bundle(tiny_bundle_last, slots=1, names=(NAME,))) as server:
            server.complete("a", max_tokens=2, logprobs=1)
            assert children() <= before
            server.complete("a", max_tokens=2, guided_regex="a")
            assert len(children() - before) == 1
        assert children() <= before

    def test_nobody_waits_for_a_grammar_of_others(self, tiny_bundle_last: Path) -> None:
        """Not even the end of the server, nor a request whose grammar is known."""
        served = of_bundle(tiny_bundle_last, slots=1, names=(NAME,))
        desk, trial = served.texts[NAME].grammars, ScriptedTrial()
        desk._trial = trial
        with ThreadPoolExecutor() as pool, running(served) as server:
            assert server.complete("a", guided_regex="known")["choices"][0]["text"] == "known"
            trial.go.clear()
            stuck = [
                pool.submit(server.client.post, "/v1/completions", json={"prompt": "a", "guided_regex": f"b{number}"})
                for number in range(4)
            ]
            server.wait_until(lambda: "b0" in trial.tried or len(trial.tried) > 1)
            assert server.post("/tokenize", prompt="a" * 3000)["count"]
            assert server.complete("a " * 150, max_tokens=1)["usage"]["completion_tokens"] == 1
            assert server.complete("a", guided_regex="known")["choices"][0]["text"] == "known"
            assert not any(one.done() for one in stuck)
            served.draining = True
            desk.close()
            assert {one.result().status_code for one in stuck} == {503}


MESSAGES = [{"role": "user", "content": "hi"}]


def children() -> set[int]:
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    found: set[int] = set()
    for thread in threading.enumerate():
        with contextlib.suppress(FileNotFoundError):  # it ends
            found |= {int(pid) for pid in Path(f"/proc/self/task/{thread.native_id}/children").read_text().split()}
    return found
