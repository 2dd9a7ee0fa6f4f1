"""examples/05_serve: two servers behind nginx are replaced under load, and no request fails."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from free_ports import free_ports

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx: apt install nginx-light"),
]

FILES = Path(__file__).parents[2] / "examples" / "05_serve"
SERVE = "python -m doge_deploy.cli serve bundle --threads 1 --slots 4"

RESTART = """#!/bin/bash
# What `systemctl restart doge-deploy@PORT` does: SIGTERM, the end of the old one, a new one.
if [ -f "$1.pid" ]; then
  kill -TERM "$(cat "$1.pid")"
  # one that has ended may still be a zombie here
  while grep -q '^State:[[:space:]]*[^Z]' "/proc/$(cat "$1.pid")/status" 2>/dev/null; do sleep 0.05; done
fi
exec {serve} --port "$1" >/dev/null 2>>"$1.log" &
echo $! >"$1.pid"
"""


class Load:
    """Clients that ask one thing after the other, whole and streamed, until they are told to stop."""

    def __init__(self, url: str, clients: int) -> None:
        self.url, self.good, self.failures = url, Counter[str](), list[str]()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=120) as client:
            for turn in range(100_000):
                if self._stop.is_set():
                    return
                stream = (turn + number) % 2 == 0
                body = {"prompt": f"{number} {turn}", "max_tokens": 40, "temperature": 0, "stream": stream}
                body["logit_bias"] = {"1": -100, "5": -100}  # no text ends by itself
                try:
                    response = client.post(f"{self.url}/v1/completions", json=body)
                    whole = '"finish_reason":"length"' in response.text and "error" not in response.text
                    if stream:
                        whole = whole and response.text.endswith("data: [DONE]\n\n")
                    if response.status_code != 200 or not whole:
                        self.failures.append(f"{response.status_code} {response.text[-300:]}")
                    else:
                        self.good[response.headers["x-served-by"]] += 1
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))


@contextlib.contextmanager
def behind_nginx(bundle: Path, folder: Path, site: str) -> Iterator[tuple[str, list[int], dict[str, str]]]:
    """Two servers and nginx with the site of examples/05_serve; its address, their ports, what update.sh is told."""
    front, *ports = free_ports(3)
    (folder / "bundle").symlink_to(bundle)
    restart = folder / "restart"
    restart.write_text(RESTART.format(serve=SERVE.replace("python", sys.executable)))
    restart.chmod(0o755)
    for number, port in zip((8000, 8001, 8002), (front, *ports), strict=True):
        site = site.replace(f"127.0.0.1:{number}", f"127.0.0.1:{port}")
    (folder / "site.conf").write_text(f'{site}\nadd_header X-Served-By "$upstream_addr";\n')
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log; worker_processes 1;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary} include {folder}/site.conf; }}\n"
    )
    environment = {**os.environ, "RESTART": f"{restart} ", "OMP_NUM_THREADS": "1"}
    proxy = None
    try:
        for port in ports:
            subprocess.run([str(restart), str(port)], cwd=folder, env=environment, check=True)
        for port in ports:
            wait_until_ready(f"http://127.0.0.1:{port}")
        proxy = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")])
        wait_until_ready(f"http://127.0.0.1:{front}")
        yield f"http://127.0.0.1:{front}", ports, environment
    finally:
        if proxy is not None:
            proxy.terminate()
            proxy.wait(30)
        for pid in folder.glob("[0-9]*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), 9)


def wait_until_ready(url: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"{url} is not ready")


def test_no_request_fails_while_both_servers_are_replaced(
    tiny_bundle_last: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = (FILES / "nginx.conf").read_text()
    with behind_nginx(tiny_bundle_last, tmp_path, site) as (url, ports, environment):
        before = [(tmp_path / f"{port}.pid").read_text() for port in ports]
        with Load(url, clients=6) as load:
            time.sleep(2)
            command = ["bash", str(FILES / "update.sh"), *map(str, ports)]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
            time.sleep(2)
        after = [(tmp_path / f"{port}.pid").read_text() for port in ports]
        logs = [(tmp_path / f"{port}.log").read_text() for port in ports]
    assert done.returncode == 0 and done.stdout == "".join(f"port {port}: replaced\n" for port in ports), done.stderr
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert [log.count("draining") for log in logs] == [1, 1]
    assert not load.failures, load.failures[:3]
    asked_again = sum(number for servers, number in load.good.items() if "," in servers)
    with capsys.disabled():
        total = sum(load.good.values())
        print(f"\n{total} requests while both servers were replaced, 0 failed, {asked_again} sent on to the other one")
    for port in ports:
        assert any(f":{port}" in servers for servers in load.good)


def test_without_a_second_try_requests_fail(tiny_bundle_last: Path, tmp_path: Path) -> None:
    """The load sees what the file is there for."""
    site, changed = re.subn(r"proxy_next_upstream .*;", "proxy_next_upstream off;", (FILES / "nginx.conf").read_text())
    assert changed == 1
    with behind_nginx(tiny_bundle_last, tmp_path, site) as (url, ports, environment):
        with Load(url, clients=6) as load:
            time.sleep(1)
            restart = environment["RESTART"].strip()
            subprocess.run([restart, str(ports[0])], cwd=tmp_path, env=environment, check=True)
            deadline = time.monotonic() + 60
            while not load.failures and time.monotonic() < deadline:
                time.sleep(0.05)
        assert load.failures
