"""The program that runs the examples of the pages finds those that are stale; here on small pages."""

from __future__ import annotations

import re
from pathlib import Path

import page_blocks
import pytest
from page_runner import Runner

SERVE = Path(__file__).parents[2] / "docs" / "serve.md"


def failures(page: str, tmp_path: Path) -> list[str]:
    runner = Runner(tmp_path, "page.md", tmp_path, tmp_path, {8000: 12345})
    runner.page(page)
    return runner.failures


GOOD = {
    "an output": "```console\n$ echo a b\na b\n```\n",
    "a command over two lines": "```console\n$ printf '%s\\n' \\\n    a\na\n```\n",
    "anything": "```console\n$ echo a b c\na ... c\n```\n",
    "a time": "```console\n$ date +%T\n12:00:00\n```\n",
    "a port": "```console\n$ echo 8000 | tr 1 x\nx2345\n```\n",
    "sizes and times": "```console\n$ echo took 3.1 s, 4 MB\ntook 12 s, 2.5 MB\n```\n",
    "a hash": "```console\n$ echo sha256 0123456789abcdef\nsha256 fedcba9876543210...\n```\n",
    "an error": "```console\n$ echo doge-deploy: error: x; exit 2\ndoge-deploy: error: x\n```\n",
    "a file": "<!-- file: a/b.yaml -->\n```yaml\na: 1\n```\n\n```console\n$ cat a/b.yaml\na: 1\n```\n",
    "an exit code": "<!-- exit code: 3 -->\n```console\n$ exit 3\n```\n",
    "numbers": "<!-- numbers vary -->\n```console\n$ echo 'at most 1.5e-05 of 20%'\nat most  2.1e-05 of 100%\n```\n",
    "names of a section": "## A\n```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n",
}  # fmt: skip

STALE = {
    "an output": ("```console\n$ echo a b\na c\n```\n", "--- the page"),
    "more output": ("```console\n$ echo a; echo b\na\n```\n", "--- the page"),
    "an exit code": ("```console\n$ false\n```\n", "exit code 1"),
    "an error that ends well": (
        "```console\n$ echo doge-deploy: error: x\ndoge-deploy: error: x\n```\n",
        "exit code 0",
    ),
    "another exit code": ("<!-- exit code: 3 -->\n```console\n$ exit 2\n```\n", "exit code 2"),
    "a number without a unit": ("```console\n$ echo 3 cases\n4 cases\n```\n", "--- the page"),
    "another unit": ("```console\n$ echo 3 MB\n3 GB\n```\n", "--- the page"),
    "a word among numbers": (
        "<!-- numbers vary -->\n```console\n$ echo 3 of 4 failed\n3 of 4 ok\n```\n",
        "--- the page",
    ),
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
    with pytest.raises(page_blocks.PageError, match="line 2"):
        failures(page, tmp_path)


@pytest.mark.parametrize("comment", ["not run: no reason that is known", "not run: device", "begins", "exit codes: 1"])
def test_a_mark_that_is_not_known_is_refused(comment: str, tmp_path: Path) -> None:
    page = f"<!-- {comment} -->\n```console\n$ true\n```\n"
    with pytest.raises(page_blocks.PageError, match="line 3"):
        failures(page, tmp_path)


def test_every_way_to_ask_is_on_the_page() -> None:
    text = SERVE.read_text(encoding="utf-8")
    found = page_blocks.blocks(text)
    assert {block.language for block in found if block.not_run is None} == {"console", "python", "javascript"}
    for reason in (block.not_run for block in found if block.not_run):
        assert len(reason.split()) > 3
    for word in "embeddings.create langchain_openai curl tokenize detokenize response_format guided_ logprobs".split():
        assert any(re.search(word, block.text) for block in found if block.not_run is None), word
