"""The files of examples/05_serve, as far as they can be tried without a system to install them on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import pytest
import yaml
from servers import NAME, of_bundle, running
from test_serve_command import started

from doge_deploy.cli.serve import serve
from doge_deploy.runtime.ort.graph_cache import VARIABLE
from doge_deploy.serve.http.security import MAX_BODY_BYTES

FILES = Path(__file__).parents[2] / "examples" / "05_serve"
UNIT = FILES / "doge-deploy@.service"
CONTAINERFILE = FILES / "Containerfile"


@pytest.fixture(scope="module")
def metrics(tiny_bundle_last: Path) -> Iterator[str]:
    """`/metrics` of a server that has answered something."""
    with running(of_bundle(tiny_bundle_last, slots=1, names=(NAME,))) as server:
        server.complete("a", max_tokens=4, temperature=0)
        yield server.client.get("/metrics").text


def instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions of a Containerfile: names, and what is said to them."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def instruction(name: str) -> str:
    (found,) = (rest for kind, rest in instructions(CONTAINERFILE) if kind == name)
    return found


def exec_start() -> list[str]:
    (line,) = re.findall(r"^ExecStart=(.+)$", UNIT.read_text(), re.MULTILINE)
    return shlex.split(line.replace("%i", "8001").replace("%d", "/run/credentials"))


def test_every_metric_of_the_dashboard_exists(metrics: str) -> None:
    board = json.loads((FILES / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in board["templating"]["list"] if isinstance(variable["query"], str)]
    named = {name for query in queries for name in re.findall(r"\bdoge_\w+", query)}
    known = {line.split("{")[0].split(" ")[0] for line in metrics.splitlines() if not line.startswith("#")}
    # a counter of what has not happened yet has no line, but a type
    known |= {f"{name}_total" for name in re.findall(r"^# TYPE (\w+?)(?:_total)? counter", metrics, re.MULTILINE)}
    assert len(named) > 10 and named <= known, named - known


def test_labels_of_the_dashboard_exist(metrics: str) -> None:
    text = (FILES / "grafana-dashboard.json").read_text()
    labels = set(re.findall(r"by \(([^)]*)\)", text))
    assert {label.strip() for group in labels for label in group.split(",")} == {"le", "model_name", "finished_reason"}
    for label in ("le", "model_name", "finished_reason"):
        assert f'{label}="' in metrics


def test_the_dashboard_lists_models_of_embeddings_too(features_bundle: Path) -> None:
    """Its choice of models comes from one metric, which must be there for each of them."""
    board = json.loads((FILES / "grafana-dashboard.json").read_text())
    (query,) = (one["query"] for one in board["templating"]["list"] if one["type"] == "query")
    (metric,) = re.findall(r"label_values\((\w+), model_name\)", query)
    with running(of_bundle(features_bundle, names=(NAME,))) as server:
        assert f'{metric}{{model_name="{NAME}"}}' in server.client.get("/metrics").text


def test_prometheus_asks_the_servers_behind_nginx() -> None:
    (job,) = yaml.safe_load((FILES / "prometheus.yml").read_text())["scrape_configs"]
    servers = re.findall(r"^\s*server ([\d.:]+)", (FILES / "nginx.conf").read_text(), re.MULTILINE)
    assert job["static_configs"][0]["targets"] == servers


def test_options_of_the_unit_are_those_of_the_command() -> None:
    command = exec_start()
    assert command[1] == "serve"
    with click.Context(serve) as context:
        found = serve.make_context("serve", command[2:], parent=context).params
    assert found["port"] == 8001 and found["api_key_file"] == Path("/run/credentials/keys")
    seconds = int(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)[0])
    assert seconds > found["drain_seconds"] + 5, "systemd would kill the server before it has drained"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt install systemd")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name.replace("@", "@8001")
    unit.write_text(UNIT.read_text().replace(exec_start()[0], sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if unit.name in line]
    assert done.returncode == 0 and not said, done.stderr
    # the check sees a mistake
    unit.write_text(unit.read_text().replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert "NoNewPrivilege" in done.stderr


def test_the_unit_and_the_image_have_a_place_for_the_cache_of_graphs() -> None:
    """The unit's user may write nowhere else, and each instance has a user of its own; the image's has no home."""
    unit = dict(re.findall(r"^(CacheDirectory|Environment)=(.+)$", UNIT.read_text(), re.MULTILINE))
    assert "%i" in unit["CacheDirectory"]
    assert unit["Environment"] == f"{VARIABLE}=%C/{unit['CacheDirectory']}"
    name, _, folder = instruction("ENV").partition("=")
    made = re.search(rf"install -d -m 700 -o (\d+) {folder}$", instruction("RUN"))
    assert name == VARIABLE and made is not None and made[1] == instruction("USER")


def test_nginx_lets_the_server_say_that_a_body_is_too_large() -> None:
    (megabytes,) = re.findall(r"^\s*client_max_body_size (\d+)m;$", (FILES / "nginx.conf").read_text(), re.MULTILINE)
    assert int(megabytes) * 2**20 > MAX_BODY_BYTES


def test_options_of_the_image_are_those_of_the_command() -> None:
    command = [*json.loads(instruction("ENTRYPOINT")), *json.loads(instruction("CMD"))]
    assert command[:2] == ["doge-deploy", "serve"]
    with click.Context(serve) as context:
        found = serve.make_context("serve", command[2:], parent=context).params
    assert str(found["port"]) == instruction("EXPOSE") and str(found["port"]) in instruction("HEALTHCHECK")
    assert {kind for kind, _ in instructions(CONTAINERFILE)} == set(
        "FROM COPY RUN ENV USER EXPOSE HEALTHCHECK STOPSIGNAL ENTRYPOINT CMD".split()
    )


@pytest.mark.sweep
def test_commands_of_the_image_in_a_fresh_environment(tiny_bundle_last: Path, tmp_path: Path) -> None:
    """All but the base image, `useradd`, the user and its folder: those need a system of their own."""
    venv.create(tmp_path / "venv", with_pip=True)
    environment = {"PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    root = Path(__file__).parents[2]
    (tmp_path / "tmp").mkdir()
    wheel = ["pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path / "tmp"), str(root)]
    subprocess.run(wheel, env=environment, check=True)
    assert list((tmp_path / "tmp").glob(instruction_of_copy()))
    steps = instruction("RUN").replace("/tmp/", f"{tmp_path}/tmp/").split(" && ")
    assert [step.split()[0] for step in steps] == ["pip", "rm", "useradd", "install"]
    # the tested versions, as far as they are named, so that the test does not depend on the day
    environment["PIP_CONSTRAINT"] = str(root / "constraints.txt")
    subprocess.run(" && ".join(steps[:2]), shell=True, env=environment, check=True)
    assert not list((tmp_path / "tmp").iterdir())

    keys = tmp_path / "keys"
    keys.write_text("key\n")
    command = [*json.loads(instruction("ENTRYPOINT")), *json.loads(instruction("CMD"))]
    places = {"/bundle": str(tiny_bundle_last), "/keys": str(keys), "0.0.0.0": "127.0.0.1"}
    command = [places.get(word, word) for word in command]
    command[0] = str(tmp_path / "venv" / "bin" / command[0])
    with started([*command, "--port", "0"]) as (process, url):
        kind, check = instruction("HEALTHCHECK").split(" CMD ")
        assert "--interval" in kind
        port = url.rsplit(":", 1)[1]
        probe = [word.replace("8000", port) for word in json.loads(check)]
        subprocess.run(probe, env=environment, check=True)
        asked = httpx.post(
            f"{url}/v1/completions",
            json={"prompt": "a", "max_tokens": 1},
            headers={"Authorization": "Bearer key"},
            timeout=60,
        )
        assert asked.status_code == 200
        process.send_signal(getattr(__import__("signal"), instruction("STOPSIGNAL")))
        assert process.wait(60) == 0
        assert subprocess.run(probe, env=environment, capture_output=True).returncode != 0


def instruction_of_copy() -> str:
    first = next(rest for kind, rest in instructions(CONTAINERFILE) if kind == "COPY")
    return first.split()[0]


def test_an_update_of_one_server_is_refused() -> None:
    done = subprocess.run(["bash", str(FILES / "update.sh"), "8001"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_an_update_touches_nothing_where_a_server_is_not_ready(tmp_path: Path) -> None:
    restart = tmp_path / "restart"
    restart.write_text("#!/bin/sh\ntouch touched\n")
    restart.chmod(0o755)
    done = subprocess.run(
        ["bash", str(FILES / "update.sh"), "1", "2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "RESTART": f"{restart} ", "WAIT_SECONDS": "1"},
    )
    assert done.returncode == 1 and "port 1 is not ready after 1 s" in done.stderr
    assert not (tmp_path / "touched").exists()
