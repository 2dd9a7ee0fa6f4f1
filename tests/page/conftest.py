"""The browser and the servers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
HERE = Path(__file__).parent
# machines may be slow; nothing here measures time
expect.set_options(timeout=60_000)

LOADED = "document.getElementById('model').options.length > 0 || !document.getElementById('error').hidden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--python", required=True, help="of the environment that has doge-deploy")
    parser.addoption("--shots", help="a folder for screenshots")


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    command = [request.config.getoption("--python"), str(HERE / "page_servers.py")]
    path = os.pathsep.join(str(folder) for folder in (HERE.parent, HERE.parent / "serve"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    # the exporter may print before the last line
    line = next(line for line in process.stdout if line.startswith("{"))
    yield json.loads(line)
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium, or CHROMIUM=/path/of/it")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Any]:
    """Opens a page; nothing may be written on its console as an error."""
    contexts, errors = [], []

    def opened(url: str, **options: Any) -> Page:
        # wait_for_function evaluates a text, which the page's policy forbids to scripts
        context = browser.new_context(bypass_csp=True, **options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_function(
            "document.getElementById('model').options.length > 0 || !document.getElementById('error').hidden"
        )
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors
