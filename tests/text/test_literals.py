"""How texts of special tokens are found in what somebody typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import doge_deploy
from doge_deploy.errors import UsageError
from doge_deploy.text.literals import _one_of
from doge_deploy.text.tokenizer import Tokenizer

DOGE_TINY = Path(doge_deploy.__file__).parent / "demo" / "doge-tiny"


@given(st.sets(st.text("ab<|", min_size=1), min_size=1), st.text("ab<|"))
def test_the_longest_is_found_at_each_place(tokens: set[str], text: str) -> None:
    plain = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    assert re.findall(_one_of(tokens), text) == re.findall(plain, text)


def test_what_hundreds_of_tokens_begin_with_is_looked_at_once() -> None:
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(256)]
    pattern = _one_of([*reserved, "[INST]", "<s>"])
    assert pattern.count("reserved") == 1
    assert all(re.fullmatch(pattern, token) for token in reserved)


def test_tokens_that_each_begin_the_next_one() -> None:
    pattern = _one_of("a" * length for length in range(1, 500))
    assert re.match(pattern, "a" * 600)[0] == "a" * 499  # type: ignore[index]


def test_a_lone_surrogate_beside_a_special_token_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not valid UTF-8: '\\udcff'"):
        messages = [{"role": "user", "content": "\udcff<|eot_id|>"}]
        Tokenizer.from_directory(DOGE_TINY).render_chat(messages, literal=True)
