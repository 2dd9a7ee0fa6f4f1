"""The front and the replicas of `doge_deploy.serve.ray`, without Ray; the whole in a cluster is `nox -s ray`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from servers import SlowSlots, scripted

from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.serve.http.security import MAX_BODY_BYTES, Gate
from doge_deploy.serve.ray import app
from doge_deploy.serve.ray.arguments import Arguments
from doge_deploy.serve.ray.front import (
    ATTEMPTS,
    Answer,
    BusyError,
    Front,
    NoReplicaError,
    ReplicaLostError,
    is_opening,
)
from doge_deploy.serve.ray.replica import Call, Message, Replica

Script = Sequence[bytes | Exception]
"""Bodies of an answer, the last of which ends it, or what goes wrong in its place."""

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


class Scripted(Answer):
    """One message after another; waits for ever behind the last one where `ends` is false."""

    def __init__(self, script: Script, kind: bytes, *, ends: bool = True, status: int = 200) -> None:
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", kind), (b"X-Request-Id", b"r")],
        }
        self.messages: list[Message | Exception] = [start]
        for index, part in enumerate(script):
            last = ends and index == len(script) - 1
            body = {"type": "http.response.body", "body": part, "more_body": not last}
            self.messages.append(part if isinstance(part, Exception) else body)
        if script and isinstance(script[0], Exception):
            self.messages.pop(0)
        self.ends, self.cancelled = ends, False

    async def next(self) -> list[Message] | None:
        if not self.messages:
            if not self.ends:
                await asyncio.Event().wait()
            return None
        message = self.messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return [message]

    def cancel(self) -> None:
        self.cancelled = True


def request(path: str = "/v1/chat/completions", method: str = "POST") -> Message:
    headers = [(b"content-type", b"application/json")]
    return {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}


class Client:
    """Sends a request to an ASGI application, and may leave."""

    def __init__(self, body: bytes = b"{}") -> None:
        self.body: bytes | None = body
        self.sent: list[Message] = []
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def text(self) -> bytes:
        assert [message["type"] for message in self.sent] == ["http.response.start"] + ["http.response.body"] * (
            len(self.sent) - 1
        )
        assert [message.get("more_body", False) for message in self.sent[1:]] == [True] * (len(self.sent) - 2) + [False]
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def error(self) -> Any:
        return json.loads(self.text)["error"]


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop go on until it is so."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def asked(
    *scripts: Script | Scripted, kind: bytes = b"text/event-stream", path: str = "/v1/chat/completions"
) -> tuple[Client, int]:
    """What a client gets whose request goes to replicas with these answers, and how many were asked."""
    answers = [script if isinstance(script, Scripted) else Scripted(script, kind) for script in scripts]
    left = list(answers)

    async def run() -> Client:
        client = Client()
        await Front(lambda call: left.pop(0))(request(path), client.receive, client.send)
        return client

    client = asyncio.run(run())
    return client, len(answers) - len(left)


LOST = ReplicaLostError("the actor died")


class TestAReplicaIsLost:
    @pytest.mark.parametrize("first", [(LOST,), (ROLE, LOST)], ids=["before all", "behind the opening chunk"])
    def test_before_the_first_token_another_one_answers(self, first: Script) -> None:
        client, count = asked(first, (ROLE, TOKEN, DONE))
        assert (client.status, client.text, count) == (200, ROLE + TOKEN + DONE, 2)

    def test_in_a_stream_it_ends_with_an_error_event(self) -> None:
        client, count = asked((ROLE, TOKEN, TOKEN, LOST), (ROLE, TOKEN, DONE))
        assert count == 1 and client.status == 200
        assert client.text.startswith(ROLE + TOKEN + TOKEN) and client.text.endswith(b"\n\n" + DONE)
        error = json.loads(client.text.split(b"\n\n")[-3].removeprefix(b"data: "))["error"]
        assert (error["code"], error["type"]) == ("replica_lost", "server_error")

    def test_in_a_whole_answer_another_one_gives_it(self) -> None:
        client, count = asked((b'{"a', LOST), (b'{"b"', b":1}"), kind=b"application/json")
        assert (client.text, count) == (b'{"b":1}', 2)

    def test_so_are_all_the_others(self) -> None:
        client, count = asked(*[[LOST]] * (ATTEMPTS + 1))
        assert (client.status, client.error["code"], count) == (503, "replica_lost", ATTEMPTS)


class TestAReplicaTakesNoWork:
    """As one whose engine has ended, until Ray has replaced it: it answers at once, so it has time for the next one."""

    def refusal(self) -> Scripted:
        return Scripted((b'{"error":{"code":"shutting_down"}}',), b"application/json", status=503)

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/ready"])
    def test_another_one_answers(self, path: str) -> None:
        first, second = self.refusal(), self.refusal()
        client, count = asked(first, second, (ROLE, TOKEN, DONE), path=path)
        assert (client.status, client.text, count) == (200, ROLE + TOKEN + DONE, 3)
        assert first.cancelled and second.cancelled

    def test_nor_do_the_others(self) -> None:
        client, count = asked(*[self.refusal() for _ in range(ATTEMPTS + 1)])
        assert (client.status, client.error["code"], count) == (503, "replica_lost", ATTEMPTS)
        assert (b"retry-after", b"1") in client.sent[0]["headers"]

    def test_another_error_is_an_answer(self) -> None:
        client, count = asked(Scripted((b'{"error":{}}',), b"application/json", status=500), (DONE,))
        assert (client.status, count) == (500, 1)


class TestNoAnswer:
    def test_too_many_wait(self) -> None:
        client, _ = asked((BusyError("4 wait"),))
        assert (client.status, client.error["code"]) == (429, "queue_full")
        assert (b"retry-after", b"1") in client.sent[0]["headers"]

    def test_there_is_none(self) -> None:
        client, _ = asked((NoReplicaError("it failed"),))
        assert (client.status, client.error["code"]) == (503, "no_replica")

    @pytest.mark.parametrize(("script", "status"), [((ValueError("x"),), 500), ((TOKEN, ValueError("x")), 200)])
    def test_a_fault_of_ours(self, script: Script, status: int) -> None:
        client, count = asked(script, (TOKEN, DONE))
        assert (client.status, count) == (status, 1)
        assert b"internal error: ValueError" in client.text

    def test_nobody_is_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("doge_deploy.serve.ray.front.READY_SECONDS", 0.05)

        async def run() -> Client:
            client = Client()
            waiting = Scripted((), b"", ends=False)
            await Front(lambda call: waiting)(request("/ready", "GET"), client.receive, client.send)
            assert waiting.cancelled
            return client

        assert asyncio.run(run()).error["code"] == "no_replica"

    @pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/metrics", 404)])
    def test_what_the_front_answers_itself(self, path: str, status: int) -> None:
        client, count = asked(path=path)
        assert (client.status, count) == (status, 0)


def test_what_comes_out_comes_at_once() -> None:
    """Only what could still come from another replica is held back."""

    async def run() -> None:
        answer, client = Scripted((ROLE, TOKEN), b"text/event-stream", ends=False), Client()
        task = asyncio.ensure_future(Front(lambda call: answer)(request(), client.receive, client.send))
        await until(lambda: len(client.sent) == 3)
        assert [message.get("body") for message in client.sent] == [None, ROLE, TOKEN]
        assert [name for name, _ in client.sent[0]["headers"]] == [b"content-type"], "Ray names the request"
        client.leaves.set()
        await asyncio.wait_for(task, 60)
        assert answer.cancelled

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "opening"),
    [
        (ROLE, True),
        (ROLE + ROLE, True),
        (ROLE + TOKEN, False),
        (TOKEN, False),
        (DONE, False),
        (b'data: {"choices":[{"index":0,"text":""}]}\n\n', False),
        (b'data: {"choices":[]}\n\n', False),
        (b'data: {"error":{}}\n\n', False),
        (b"", True),
    ],
    ids=["role", "two roles", "role and token", "token", "done", "text", "usage", "error", "nothing"],
)
def test_opening(body: bytes, opening: bool) -> None:
    assert is_opening(body) == opening


def test_a_body_that_is_too_large_is_cut_where_that_shows() -> None:
    sizes = []

    def ask(call: Call) -> Answer:
        sizes.append(len(call.body))
        return Scripted((b"{}",), b"application/json")

    async def run() -> None:
        parts = [b"x" * 2**20] * 12
        client = Client()

        async def receive() -> Message:
            return (
                {"type": "http.request", "body": parts.pop(), "more_body": bool(parts)}
                if parts
                else await client.receive()
            )

        await Front(ask)(request(), receive, client.send)

    asyncio.run(run())
    assert MAX_BODY_BYTES < sizes[0] <= MAX_BODY_BYTES + 2**20


def test_keys_are_asked_for_in_front() -> None:
    async def run() -> Client:
        client = Client()
        await Gate(Front(lambda call: pytest.fail("it was passed on")), [b"key"])(
            request(), client.receive, client.send
        )  # type: ignore[arg-type]
        return client

    assert asyncio.run(run()).status == 401


# Replicas, of real applications over scripted slots.


def with_replicas(bundle: Path, use: Callable[[list[Replica], list[SlowSlots]], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        rule = lambda history: 70 + len(history) % 20  # noqa: E731
        slots = [SlowSlots(2, rule=rule, vocab=1024, max_length=512, seconds=0.002) for _ in range(2)]
        replicas = [Replica() for _ in slots]
        for replica, own in zip(replicas, slots, strict=True):
            await replica.serve(scripted(bundle, own))
        try:
            await use(replicas, slots)
        finally:
            for replica in replicas:
                await replica.close()

    asyncio.run(run())


class Direct(Answer):
    """A replica in this process; it can die."""

    def __init__(self, replica: Replica, call: Call) -> None:
        self.messages: AsyncIterator[list[Message]] = replica.answer(call)
        self.lost = False

    async def next(self) -> list[Message] | None:
        found = await anext(self.messages, None)
        if self.lost:
            raise LOST
        return found

    def cancel(self) -> None:
        self.closing = asyncio.ensure_future(self.messages.aclose())  # type: ignore[attr-defined]


def body_of(**changes: Any) -> bytes:
    return json.dumps({"prompt": [7, 8, 9], "max_tokens": 6, "temperature": 0, **changes}).encode()


def test_an_answer_through_front_and_replica_is_that_of_the_application(tiny_bundle: Path) -> None:
    async def use(replicas: list[Replica], slots: list[SlowSlots]) -> None:
        texts = []
        for index, stream in ((0, False), (1, False), (0, True)):
            client = Client(body_of(stream=stream))
            front = Front(lambda call, index=index: Direct(replicas[index], call))
            await front(request("/v1/completions"), client.receive, client.send)
            assert client.status == 200
            if stream:
                events = [json.loads(line[6:]) for line in client.text.split(b"\n\n") if line.startswith(b"data: {")]
                texts.append("".join(event["choices"][0]["text"] for event in events))
            else:
                texts.append(json.loads(client.text)["choices"][0]["text"])
        assert len(set(texts)) == 1 and texts[0]
        client = Client(b'{"prompt": 5}')
        await Front(lambda call: Direct(replicas[0], call))(request("/v1/completions"), client.receive, client.send)
        assert client.status == 400 and client.error["param"] == "prompt"
        names = {sample.name for sample in replicas[0].samples()}
        assert {"doge_num_requests_running", "doge_time_to_first_token_seconds_bucket"} <= names
        assert not [name for name in names if name.endswith("_created")]
        [tokens] = [one.value for one in replicas[0].samples() if one.name == "doge_generation_tokens_total"]
        assert tokens == 12

    with_replicas(tiny_bundle, use)


def test_a_client_that_leaves_frees_its_slot(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: not only when it is cancelled after its time to leave."""
    monkeypatch.setattr("doge_deploy.serve.ray.replica._LEAVING_SECONDS", 600)

    async def use(replicas: list[Replica], slots: list[SlowSlots]) -> None:
        scheduler = next(iter(replicas[0]._served.texts.values())).engine._scheduler
        slots[0].seconds = 0.05
        for left, stream in enumerate((True, False), 1):
            client = Client(body_of(stream=stream, max_tokens=500))
            front = Front(lambda call: Direct(replicas[0], call))
            task = asyncio.ensure_future(front(request("/v1/completions"), client.receive, client.send))
            await until(lambda: bool(scheduler.decoding))
            client.leaves.set()
            await asyncio.wait_for(task, 60)
            await until(lambda: bool(scheduler.counters.finished) and scheduler.idle)
            assert scheduler.counters.finished == {"cancelled": left}

    with_replicas(tiny_bundle, use)


@pytest.mark.parametrize("reads", [True, False])
def test_a_replica_ends_with_its_engine(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reads: bool
) -> None:
    """When those who lost a text have been told; but it does not wait for ever for one who does not read."""
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("doge_deploy.serve.ray.replica.ENDING_SECONDS", 0)
    monkeypatch.setattr("doge_deploy.serve.ray.replica.TELLING_SECONDS", 600 if reads else 0.01)

    async def use(replicas: list[Replica], slots: list[SlowSlots]) -> None:
        running = Direct(replicas[0], Call(request("/v1/completions"), body_of(stream=True, max_tokens=500)))
        first = await running.next()
        assert first and not replicas[0].end_if_failed()

        def broken(*_: Any) -> None:
            raise KeyboardInterrupt

        model = next(iter(replicas[0]._served.texts.values()))
        model.engine._scheduler._prefill = broken  # type: ignore[method-assign]
        client = Client(body_of())
        await Front(lambda call: Direct(replicas[0], call))(request("/v1/completions"), client.receive, client.send)
        assert client.status == 500
        assert not replicas[1].end_if_failed()
        assert replicas[0].end_if_failed() and replicas[0].end_if_failed()
        (told,) = [record for record in caplog.records if record.getMessage() == "replica ends"]
        assert "the engine of doge has ended" in str(vars(told))
        end = replicas[0]._end
        assert end is not None
        if reads:
            await asyncio.sleep(0.2)
            assert end.is_alive() and not ended, "it has not been told yet"
            text = b""
            while (found := await running.next()) is not None:
                text += b"".join(message.get("body", b"") for message in found)
            assert b"the engine failed" in text
        await asyncio.to_thread(end.join, 60)
        assert ended == [1]

    with_replicas(tiny_bundle, use)


def test_a_replica_whose_engine_has_ended_takes_no_request_from_another(tiny_bundle: Path) -> None:
    async def use(replicas: list[Replica], slots: list[SlowSlots]) -> None:
        model = next(iter(replicas[0]._served.texts.values()))
        model.engine._scheduler._prefill = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        client, asked = Client(body_of()), list(replicas)
        await Front(lambda call: Direct(replicas[0], call))(request("/v1/completions"), client.receive, client.send)
        assert client.status == 500, "whose request it was that ended it is not known, so no other one gets it"
        client = Client(body_of())
        await Front(lambda call: Direct(asked.pop(0), call))(request("/v1/completions"), client.receive, client.send)
        assert (client.status, asked) == (200, [])

    with_replicas(tiny_bundle, use)


def test_of_a_stream_that_nobody_reads_a_replica_holds_little(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doge_deploy.serve.http.inbox.MAX_UNREAD", 20)
    monkeypatch.setattr("doge_deploy.serve.ray.replica.MAX_WAITING", 8)

    async def use(replicas: list[Replica], slots: list[SlowSlots]) -> None:
        scheduler = next(iter(replicas[0]._served.texts.values())).engine._scheduler
        answer = replicas[0].answer(Call(request("/v1/completions"), body_of(stream=True, max_tokens=60)))
        first = await anext(answer)
        await until(lambda: bool(scheduler.counters.finished))
        assert scheduler.counters.finished == {"cancelled": 1}, "it ended by itself"
        messages = [*first, *[message for batch in [batch async for batch in answer] for message in batch]]
        text = b"".join(message.get("body", b"") for message in messages)
        assert b"stream_not_read" in text and text.endswith(DONE) and text.count(b"data: ") < 60

    with_replicas(tiny_bundle, use)


def test_of_a_stream_that_is_read_late_nothing_is_lost(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doge_deploy.serve.ray.replica.MAX_WAITING", 2)

    async def use(replicas: list[Replica], slots: list[SlowSlots]) -> None:
        told, sizes = [], []
        call = Call(request("/v1/completions"), body_of(stream=True, max_tokens=50))
        for pause in (0.0, 0.02):
            stream = b""
            async for batch in replicas[0].answer(call):
                sizes.append(len(batch))
                stream += b"".join(message.get("body", b"") for message in batch)
                await asyncio.sleep(pause)
            events = [json.loads(line[6:]) for line in stream.split(b"\n\n") if line.startswith(b"data: {")]
            told.append("".join(event["choices"][0]["text"] for event in events))
        assert told[0] == told[1] and len(told[0]) >= 50 and max(sizes) <= 2

    with_replicas(tiny_bundle, use)


class TestArguments:
    def test_as_on_a_command_line(self) -> None:
        found = Arguments.of({"bundles": "a,b", "names": "x,y", "slots": "6", "replicas": "2"})
        assert (found.bundles, found.names, found.slots, found.replicas) == (["a", "b"], ["x", "y"], 6, 2)
        assert found.options.names == ("x", "y") and found.options.limits.queue_requests == found.ongoing == 8

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({}, "bundles={}: Field required"),
            ({"bundles": ""}, "bundles"),
            ({"bundles": "a", "slot": 4}, "slot: unknown argument (did you mean 'slots'?); known: bundles, names"),
            ({"bundles": "a", "slots": 0}, "slots=0: Input should be greater than or equal to 1"),
            ({"bundles": "a", "min_replicas": 5}, "min_replicas=5: must be at most max_replicas=4"),
        ],
        ids=["nothing", "none", "unknown", "illegal", "contradiction"],
    )
    def test_wrong(self, values: dict[str, Any], says: str) -> None:
        with pytest.raises(UsageError) as error:
            app(values)
        assert says in str(error.value) and "\n" not in str(error.value)

    def test_without_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingDependencyError, match="Ray Serve is not installed"):
            app({"bundles": "a"})
