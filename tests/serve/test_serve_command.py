"""`doge-deploy serve` as a process: how it starts, how it is told what is wrong, and how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from doge_deploy.cli.main import run_command
from doge_deploy.errors import UsageError
from doge_deploy.serve.start import ServeOptions

LONG = {"prompt": "x", "max_tokens": 500, "stream": True, "logit_bias": {"1": -100, "5": -100}}
"""A text that does not end by itself."""

MANY = {**LONG, "prompt": ["x"] * 4, "n": 16}
"""More than a server computes while a test looks at it."""


@contextlib.contextmanager
def serving(bundle: Path, *options: str, said: list[str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address; it is killed at the end if it is still there. `said` gets the rest of its log."""
    command = [sys.executable, "-m", "doge_deploy.cli", "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    with started(command, said) as found:
        yield found


@contextlib.contextmanager
def started(command: Sequence[str], said: list[str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The same of any command that serves."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://[0-9.]+:[0-9]+", line)
        assert found, line
        # with nobody who reads its log the server would stand still as soon as the pipe is full
        reader = threading.Thread(target=([] if said is None else said).extend, args=(process.stderr,), daemon=True)
        reader.start()
        yield process, found[0]
        process.kill()
        reader.join(60)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def unfinished(url: str) -> Iterator[None]:
    """A request whose body does not come within the block; it is under way from its beginning on."""
    host, port = url.removeprefix("http://").split(":")
    kind = "Content-Type: application/json\r\nContent-Length: 99\r\nExpect: 100-continue"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{kind}\r\n\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 100")
        yield


def test_sigterm_lets_texts_end_that_run_or_wait_and_takes_no_more(tiny_bundle_last: Path) -> None:
    with (
        serving(tiny_bundle_last, "--slots", "1") as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        body = {
            "prompt": "x",
            "n": 3,  # two wait for the slot of the first
            "max_tokens": 400,
            "temperature": 0,
            "stream": True,
            "logit_bias": {"1": -100, "5": -100},
        }
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            with unfinished(url):  # the server is there as long, also where its texts have ended
                process.send_signal(signal.SIGTERM)
                late = client.get("/ready")
                assert late.status_code == 503 and late.json() == {"status": "draining"}
                refused = client.post("/v1/completions", json={"prompt": "y"})
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
            rest = [line for line in lines if line]
        assert rest.pop() == "data: [DONE]"
        ends = [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in rest]
        assert ends.count("length") == 3
        assert process.wait(60) == 0


def test_what_does_not_end_in_time_ends_with_an_error_event(tiny_bundle_last: Path) -> None:
    with serving(tiny_bundle_last, "--drain-seconds", "0") as (process, url), httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{url}/v1/completions", json=MANY) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
        assert "shutting down" in rest[-1]["error"]["message"]
        assert process.wait(60) == 0


def test_who_is_not_waited_for_is_told_so(tiny_bundle_last: Path) -> None:
    """By a second signal: a text of which nothing was sent, and a body that has not come."""
    said: list[str] = []
    with (
        serving(tiny_bundle_last, "--drain-seconds", "600", "--slots", "1", said=said) as (process, url),
        ThreadPoolExecutor() as pool,
    ):
        address = tuple(url.removeprefix("http://").split(":"))
        head = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        with contextlib.ExitStack() as opened:
            slow = [opened.enter_context(socket.create_connection(address, timeout=60)) for _ in range(2)]
            for connection, path in zip(slow, ("/v1/completions", "/tokenize"), strict=True):
                connection.sendall(head.format(path).encode())
            # a slot for one of them, so that there is always one that has not ended
            long = {**LONG, "stream": False, "n": 16}
            asked = [pool.submit(httpx.post, f"{url}/v1/completions", json=long, timeout=60) for _ in range(4)]
            while not re.search(r"waiting\{.*\} [1-9]", httpx.get(f"{url}/metrics", timeout=60).text):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/ready", timeout=60).status_code != 503:
                time.sleep(0.01)
            assert httpx.post(f"{url}/tokenize", json={"prompt": "a"}, timeout=60).status_code == 503
            process.send_signal(signal.SIGTERM)
            answers = [connection.makefile("rb").read() for connection in slow]
            assert all(answer.startswith(b"HTTP/1.1 503") and b'"shutting_down"' in answer for answer in answers)
            statuses = [one.result().status_code for one in asked]
            assert 503 in statuses and set(statuses) <= {200, 503}
        assert process.wait(60) == 0
    assert any(" draining " in line for line in said) and not any("Traceback" in line for line in said)


def test_a_second_signal_ends_at_once(tiny_bundle_last: Path) -> None:
    with serving(tiny_bundle_last, "--drain-seconds", "600") as (process, url):
        client = httpx.Client(base_url=url, timeout=60)
        with unfinished(url), client, client.stream("POST", "/v1/completions", json=MANY) as response:
            assert response.status_code == 200
            next(response.iter_lines())
            process.send_signal(signal.SIGINT)
            assert client.get("/ready").json() == {"status": "draining"}  # it has noticed the first one
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            process.wait(60)


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--host", "0.0.0.0"], "give --api-key-file FILE, or --no-auth", 2),
        (["--port", "99999"], "--port 99999: must be 0", 2),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere: cannot be read", 2),
        (["--served-model-name", "a", "--served-model-name", "b"], "2 names for 1 bundles", 2),
        (["--backend", "nothing"], "nothing", 2),
        (["--served-model-name", ""], "--served-model-name '': must hold more than blanks", 2),
        (["--served-model-name", " \t"], "--served-model-name ' \\t': must hold more than blanks", 2),
        (["--drain-seconds", "-1"], "--drain-seconds -1.0: must be at least 0", 2),
        (["--api-key-file", "x", "--no-auth"], "contradict each other", 2),
        (["--host", "my..host", "--no-auth"], "--host 'my..host': is no name of a host: label empty or too long", 2),
        (["--host", "a" * 64, "--no-auth"], "is no name of a host: label", 2),
        (["--host", "\udcff", "--no-auth"], "--host '\\udcff': is no name of a host", 2),
    ],
)
def test_wrong_options_are_one_line(
    tiny_bundle_last: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str, code: int
) -> None:
    assert run_command(["serve", str(tiny_bundle_last), *options]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.0.2.7", "example.org", "128.0.0.1", "127.0.0.1.example.org"]
)
def test_other_machines_need_a_key_or_leave(host: str) -> None:
    with pytest.raises(UsageError, match="can be reached from other machines"):
        ServeOptions(host=host)
    assert ServeOptions(host=host, no_auth=True).host == ServeOptions(host=host, api_key_file=Path("keys")).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.255.255.254", "::1", "localhost"])
def test_this_machine_alone_is_served_unless_another_address_is_named(host: str) -> None:
    assert ServeOptions().host == "127.0.0.1" and ServeOptions(host=host).api_key_file is None


def test_a_name_that_cannot_be_resolved_is_one_line(tiny_bundle_last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["serve", str(tiny_bundle_last), "--host", "nosuchhost.invalid", "--no-auth"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("cannot be bound: no address is known for this host's name\n") and error.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(tiny_bundle_last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for _ in range(2):  # the second server of a process says it too
            assert run_command(["serve", str(tiny_bundle_last), "--port", port]) == 2
            error = capsys.readouterr().err
            assert f"--port {port}: cannot be bound: another program listens there; choose another --port\n" in error
            assert error.count("\n") == 1


def test_two_bundles_of_one_name_need_names(tiny_bundle_last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["serve", str(tiny_bundle_last), str(tiny_bundle_last)]) == 2
    assert "two bundles are called 'doge-tiny': give each its own --served-model-name" in capsys.readouterr().err


def test_mixtures_whose_rows_depend_on_each_other_are_refused(
    tiny_moe_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["serve", str(tiny_moe_bundle), "--port", "0"]) == 3
    assert "--routing per-token, or use one slot" in capsys.readouterr().err


@pytest.mark.parametrize("further", [False, True], ids=["alone", "beside another"])
def test_damage_is_found_before_a_port_is_bound(
    further: bool,
    tiny_bundle_last: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where it is found by a thread, and something else is wrong."""
    monkeypatch.setattr("doge_deploy.bundle.file_check.AT_ONCE_BYTES", 0)
    path = Path(shutil.copytree(tiny_bundle_last, tmp_path / "bundle"))
    with (path / "weights.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"~")
    others = [str(tiny_bundle_last)] if further else []
    assert run_command(["inspect", str(path)]) == 3
    expected = capsys.readouterr().err
    assert "weights.safetensors was altered" in expected
    for options in ([], ["--served-model-name", "a", "--served-model-name", "b", "--served-model-name", "c"]):
        assert run_command(["serve", str(path), *others, "--port", "0", "--threads", "1", *options]) == 3
        assert capsys.readouterr().err.endswith(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_threads_share_one_heap(tiny_bundle_last: Path) -> None:
    """glibc reserves heaps of threads 64 MiB at a time, at multiples of that: first what is in use, then the rest."""
    with serving(tiny_bundle_last) as (process, url):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
        lines = [line.split() for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
    reserved = 2**26
    places = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    heaps = [
        hex(start)
        for (start, end), (rest, last), line in zip(places, places[1:], lines[1:], strict=False)
        if start % reserved == 0 and line[1] == "---p" and rest == end and last >= start + reserved
    ]
    assert len(places) > 10 and not heaps
