"""The program that runs the examples of docs/serve.md finds those that are stale; here on small pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "serve_clients"))
import run_page


def failures(page: str, tmp_path: Path) -> list[str]:
    runner = run_page.Runner(tmp_path, tmp_path, tmp_path, {8000: 12345})
    runner.page(page)
    return runner.failures


GOOD = {
    "an output": "```console\n$ echo a b\na b\n```\n",
    "a command over two lines": "```console\n$ printf '%s\\n' \\\n    a\na\n```\n",
    "anything": "```console\n$ echo a b c\na ... c\n```\n",
    "a time": "```console\n$ date +%T\n12:00:00\n```\n",
    "a port": "```console\n$ echo 8000 | tr 1 x\nx2345\n```\n",
    "names of a section": "## A\n```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n",
}  # fmt: skip

STALE = {
    "an output": ("```console\n$ echo a b\na c\n```\n", "--- the page"),
    "more output": ("```console\n$ echo a; echo b\na\n```\n", "--- the page"),
    "an exit code": ("```console\n$ false\n```\n", "exit code 1"),
    "a failure of Python": ("```python\nprint(y)\n```\n", "NameError"),
    "an output of Python": ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "--- the page"),
    "names of another section": ("## A\n```python\nx = 1\n```\n## B\n```python\nprint(x)\n```\n", "NameError"),
    "a part twice": ("```console\n$ echo a b\na ... b b\n```\n", "--- the page"),
    "much of anything": ("```console\n$ seq 999\n" + "1 ... " * 30 + "\n```\n", "--- the page"),
    "a dot is no wildcard": ("```console\n$ echo axb\na.b\n```\n", "--- the page"),
}


@pytest.mark.parametrize("page", GOOD.values(), ids=GOOD)
def test_a_page_that_is_true_passes(page: str, tmp_path: Path) -> None:
    assert failures(page, tmp_path) == []


@pytest.mark.parametrize(("page", "said"), STALE.values(), ids=STALE)
def test_a_stale_example_fails(page: str, said: str, tmp_path: Path) -> None:
    (failure,) = failures(page, tmp_path)
    assert said in failure


@pytest.mark.parametrize("page", ["```text\na\n```\n", "```sh\nls\n```\n", "```yaml\na: 1\n```\n", "```\na\n```\n"])
def test_nothing_is_passed_over_without_a_reason(page: str, tmp_path: Path) -> None:
    with pytest.raises(run_page.PageError, match="line 2"):
        failures(page, tmp_path)


def test_every_way_to_ask_is_on_the_page() -> None:
    text = run_page.PAGE.read_text()
    found = run_page.blocks(text)
    assert {block.language for block in found if block.not_run is None} == {"console", "python", "javascript"}
    for reason in (block.not_run for block in found if block.not_run):
        assert len(reason.split()) > 3
    for word in "embeddings.create langchain_openai curl tokenize detokenize response_format guided_ logprobs".split():
        assert any(re.search(word, block.text) for block in found if block.not_run is None), word
