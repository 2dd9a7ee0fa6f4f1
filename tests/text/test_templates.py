"""Limits of chat templates; what they render is compared with transformers in tests/hard_inputs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from jinja2.exceptions import SecurityError

from doge_deploy.text import template_limits
from doge_deploy.text.templates import ChatTemplate, TemplateLimit

CHAT = [{"role": "user", "content": "hi"}]


def render(template: str, messages: list[dict[str, Any]] = CHAT) -> str:
    return ChatTemplate(template).render(messages, {"bos_token": "<s>"}, add_generation_prompt=True)


def test_a_long_conversation_is_within_the_limits() -> None:
    template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
        "{% endif %}{{ '<|' ~ m.role ~ '|>' + m.content | trim }}{% endfor %}"
    )
    messages = [{"role": role, "content": " word" * 200} for _ in range(1000) for role in ("user", "assistant")]
    assert render(template, messages).count("<|") == 2000


def test_messages_are_left_as_they_are() -> None:
    message = {"role": "user", "content": "hi", "name": None, "thinking": "so"}
    assert render("{{ messages[0] | tojson(sort_keys=true) }}", [message]) == (
        '{"content": "hi", "reasoning_content": "so", "role": "user", "thinking": "so"}'
    )
    assert message == {"role": "user", "content": "hi", "name": None, "thinking": "so"}


@pytest.mark.parametrize(
    ("limit", "value", "template", "says"),
    [
        ("MAX_STEPS", 50, "{% for i in range(49) %}{% endfor %}", None),
        ("MAX_STEPS", 50, "{% for i in range(60) %}{% endfor %}", "more than 50 steps"),
        ("MAX_STEPS", 50, "{% macro f() %}{% endmacro %}" + "{{ f() }}" * 60, "more than 50 steps"),
        ("MAX_STEPS", 50, "{{ messages[0].role | upper }}" * 60, "more than 50 steps"),
        ("MAX_SIZE", 100, "{{ 'x' * 90 }}", None),
        ("MAX_SIZE", 100, "{{ 'x' * 101 }}", "makes more than 100"),
        ("MAX_SIZE", 100, "{{ 'x' * 90 }}{{ messages[0].content * 45 }}", "writes more than 100"),
        ("MAX_SIZE", 100, "{{ ('x' * 60) ~ ('y' * 60) }}", "makes more than 100"),
        ("MAX_SIZE", 100, "{% set x = ['y' * 60] %}{{ [x, x] | length }}", "makes more than 100"),
        ("MAX_SIZE", 100, "{{ messages | tojson(indent=90) }}", "makes more than 100"),
        ("MAX_SECONDS", 0.0, "{% for i in range(99) %}{% endfor %}", "computes for more than 0 seconds"),
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, limit: str, value: float, template: str, says: str | None) -> None:
    compiled = ChatTemplate(template)
    monkeypatch.setattr(template_limits, limit, value)
    if says is None:
        compiled.render(CHAT, {}, add_generation_prompt=False)
        return
    with pytest.raises(TemplateLimit, match=says):
        compiled.render(CHAT, {}, add_generation_prompt=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(messages[0]) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages[0].pop('content') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.os }}",
    ],
)
def test_the_sandbox_lets_nothing_be_changed_and_nothing_else_be_reached(template: str) -> None:
    with pytest.raises(SecurityError):
        render(template, [dict(CHAT[0])])


def test_every_rendering_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", 150)
    template = ChatTemplate("{% for i in range(60) %}x{% endfor %}")
    texts: list[str] = []

    def run() -> None:
        texts.extend(template.render(CHAT, {}, add_generation_prompt=False) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["x" * 60] * 20
