"""What a stream is made of: the quick way to write a chunk gives the bytes of the slow one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted_slots import ScriptedSlots
from servers import NAME, scripted

from doge_deploy.options.generation import GenerationOptions
from doge_deploy.runtime.logprobs import TokenLogprobs
from doge_deploy.serve.http.chunks import Chunks
from doge_deploy.serve.http.forms import ChatForm, Form, TextForm
from doge_deploy.serve.http.plans import Choice, Plan
from doge_deploy.serve.model import Answering

TEXTS = [
    "a",
    " blank",
    '"quoted"',
    "back\\slash",
    "line\nend\r\t\b\f",
    "\0\x01\x1f\x7f",
    "\u2028\u2029",
    "\N{DOG FACE}é",
    "</script>",
    "\\u0000",
]


def plan(bundle: Path, *, include_usage: bool, logprobs: int | None = None, name: str = NAME) -> Plan:
    model = scripted(bundle, ScriptedSlots(1)).texts[NAME]
    model.name = name
    answering = Answering(GenerationOptions(), logprobs)
    texts = None if logprobs is None else model.token_texts
    return Plan(model, answering, [Choice(0, [7]), Choice(1, [7])], [], True, include_usage, "cmpl-0", texts)


@pytest.mark.parametrize("form", [ChatForm, TextForm])
@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("name", [NAME, 'odd "\0" name \N{DOG FACE}'])
@pytest.mark.parametrize("entries", [(), (TokenLogprobs(70, -1.5, ((71, -0.5), (70, -1.5))),)])
def test_a_chunk_is_what_it_would_be_made_from_its_parts(
    tiny_bundle: Path, form: type[Form], include_usage: bool, name: str, entries: tuple[TokenLogprobs, ...]
) -> None:
    asked = plan(tiny_bundle, include_usage=include_usage, name=name, logprobs=len(entries) or None)
    quick, slow = Chunks(asked, form()), Chunks(asked, form())
    for text in (*TEXTS, *TEXTS):
        for choice in asked.choices:
            found = quick.part(choice, text, entries)
            assert found == slow.slow(choice, text, entries)
            body = json.loads(found.removeprefix(b"data: "))
            assert body["model"] == name and body["choices"][0]["index"] == choice.index
            assert text in (body["choices"][0].get("text"), body["choices"][0].get("delta", {}).get("content"))


def test_what_was_made_before_is_used(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparison above compares nothing."""
    chunks = Chunks(asked := plan(tiny_bundle, include_usage=False), TextForm())
    before = chunks.part(asked.choices[0], "a")
    monkeypatch.setattr(chunks, "slow", None)
    assert chunks.part(asked.choices[0], "b") == before.replace(b'"a"', b'"b"')


def test_where_logprobs_are_asked_for_their_list_goes_on(tiny_bundle: Path) -> None:
    asked = plan(tiny_bundle, include_usage=False, logprobs=1)
    found = json.loads(Chunks(asked, TextForm()).part(asked.choices[0], "a").removeprefix(b"data: "))
    assert found["choices"][0]["logprobs"] == {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
