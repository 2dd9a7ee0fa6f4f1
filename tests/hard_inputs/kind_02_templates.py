"""Chat templates as checkpoints write them: rendered as transformers renders them, or stopped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from doge_deploy.errors import BrokenBundleError, UsageError
from doge_deploy.text.tokenizer import Tokenizer
from hard_inputs.frame import Case, Outcome, demo_copy, refused, right, wrong

KIND = "2 chat templates"

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " Be short. "},
    {"role": "user", "content": 'What is <b>漢字</b> & "why"?\n'},
    {"role": "assistant", "content": "Text."},
    {"role": "user", "content": "And 😀?"},
]

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
INST = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{%- set system = '<<SYS>>\\n' ~ messages[0].content | trim ~ '\\n<</SYS>>\\n\\n' %}{% else %}
{%- set loop_messages = messages %}{% set system = '' %}{% endif %}{% for m in loop_messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}[INST] {{ (system if loop.first else '') + m.content.strip() }} [/INST]
{%- else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"""
TOOLS = """\
{%- if tools is not none and tools %}{{ tools | tojson(indent=4) }}{% elif tools is none %}no tools{% endif %}
{%- if documents is defined and documents is not none %}documents{% endif %}
{%- if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %} {{ date_string }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}"""

RENDERED: dict[str, str] = {
    "chatml": CHATML,
    "[INST] with a system message": INST,
    "tools and documents are none": TOOLS,
    "tojson": "{{ messages | tojson }}",
    "tojson, compact and sorted": "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
    "tojson, ASCII": "{{ messages | tojson(ensure_ascii=true) }}",
    "tojson, indented": "{{ messages[0] | tojson(indent=2) }}",
    "tojson, positional": "{{ messages[0] | tojson(true, 1) }}",
    "strftime_now": "{{ strftime_now('%d %b %Y') | length }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ loop.index }}"
    "{% set x = 1 %}{% endgeneration %}{{ x is defined }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation with blanks": "{%- for m in messages -%}{%- generation -%} {{ m.content }} {%- endgeneration -%}"
    " .{%- endfor -%}",
    "namespace": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.found = true %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{{ ns.found }} {{ ns.n }}",
    "namespace called self": "{% set ns = namespace(self=1) %}{{ ns.self }}",
    "dict": "{{ dict(a=1, b=[2]) }} {{ dict.fromkeys(['a', 'b'], 0) }}",
    "break and continue": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if loop.index == 4 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "macros": "{% macro turn(role, text='') -%}<{{ role }}>{{ text }}{{ caller() if caller else '' }}{%- endmacro %}"
    "{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}{% call turn('x') %}inner{% endcall %}",
    "recursive loop": "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}"
    "{% endif %}{% endfor %}",
    "set block and filter block": "{% set t %}{{ messages[0].content }}{% endset %}[{{ t | trim }}]"
    "{% filter upper %}shout{% endfilter %}",
    "selectattr and map": "{{ messages"
    " | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}"
    " {{ messages | rejectattr('role', 'eq', 'user') | list | length }}",
    "slices": "{{ messages[::-1] | map(attribute='role') | list }} {{ messages[-1]['content'][:3] }}",
    "methods of texts": "{{ messages[0].content.strip().split(' ')[-1].rstrip('.').upper() }}"
    "{{ 'a-b'.replace('-', '+') }}{{ '{:>4}|{}'.format('x', 1) }}{{ '%s-%d' % ('y', 2) }}{{ 'z' * 3 }}",
    "methods of dicts": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{{ messages[0].get('tool', 'no') }}",
    "tests": "{{ messages is sequence }} {{ messages[0].content is string }} {{ messages[0] is mapping }} "
    "{{ x is defined }} {{ 3 is odd }} {{ none is none }} {{ messages[0].tool_calls is defined }}",
    "undefined is empty": "[{{ nothing }}{{ messages[0].nothing }}]",
    "concatenation": "{{ 'a' ~ 1 ~ none ~ true ~ ['x'] ~ messages | length }}",
    "lists in lists": "{% set x = [1, 2] + [messages[0].role] %}{{ x }} {{ (1, x) }} {{ {'k': x} }}",
    "arithmetic": "{{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 10 }} {{ 1 / 4 }} {{ -3 | abs }} {{ [3, 1, 2] | sort | last }}"
    " {{ 0.5 | round }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
    "blanks around blocks": "  {% if true %}\n  a\n    {% endif %}\n  b\n{# note #}\nc\n",
    "default and or": "{{ messages[0].name | default('none', true) }}{{ system_message or 'x' }}{{ loop is defined }}",
    "groupby and batch": "{% for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}"
    "{{ [1, 2, 3] | batch(2, 'x') | list }}",
    "conditional loop": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ loop.last }}"
    "{{ loop.previtem is defined }}"
    "{% else %}none{% endfor %}{% for m in [] %}{% else %}empty{% endfor %}",
    "json within text": "{{ '{\"name\": ' + (messages[0].role | tojson) + '}' }}",
    "unicode names": "{% set größe = 3 %}{{ größe }}{{ '\\u00e9\\n' }}",
    "raw": "{% raw %}{{ not rendered }}{% endraw %}",
    "cycler and joiner": "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}"
    "{% set j = joiner(', ') %}{% for m in messages %}{{ j() }}{{ m.role }}{% endfor %}",
}

STOPPED: dict[str, str] = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output without end": "{% for i in range(99999) %}{{ messages[0].content * 9999 }}{% endfor %}",
    "a text that doubles": "{% set ns = namespace(t='ab') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}"
    "{% endfor %}",
    "a block that doubles": "{% set ns = namespace(t='ab') %}{% for i in range(99) %}{% set x %}{{ ns.t }}"
    "{{ ns.t }}{% endset %}"
    "{% set ns.t = x %}{% endfor %}",
    "a list that doubles": "{% set ns = namespace(t=[1]) %}{% for i in range(99) %}{% set ns.t = [ns.t, ns.t] %}"
    "{% endfor %}{{ ns.t }}",
    "calls that double": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "a wide format": "{{ '%999999999d' % 1 }}",
    "a wide field": "{{ '{:>999999999}'.format('x') }}",
    "a wide filter": "{{ 'x' | center(999999999) }}",
    "a large power": "{{ 9 ** 99999999 }}",
    "a long text times": "{{ 'x' * 99999999999 }}",
    "a long join": "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "a long replacement": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
}

REFUSED: dict[str, str] = {
    "raise_exception": "{{ raise_exception('roles must\nalternate') }}",
    "no template at all": "{% if %}",
    "internals": "{{ ''.__class__.__mro__ }}",
    "changes its values": "{{ messages.append(1) }}",
    "underscores in a namespace": "{% set ns = namespace(_x=1) %}",
    "another file": "{% include '/etc/passwd' %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an unknown filter": "{{ messages | shell }}",
    "an error of types": "{{ messages[0].content + 1 }}",
}


def template_of(folder: Path, template: str) -> Tokenizer:
    checkpoint = demo_copy(folder)
    (checkpoint / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.from_directory(checkpoint)


def rendered(template: str, folder: Path) -> Outcome:
    from transformers import AutoTokenizer

    own = template_of(folder, template)
    reference = AutoTokenizer.from_pretrained(folder / "checkpoint")
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    if (text := own.chat_text(CHAT)) != expected:
        return wrong(f"{text!r} instead of {expected!r}")
    ids = reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    return right() if own.render_chat(CHAT) == ids else wrong("other ids")


def stopped(template: str, folder: Path) -> Outcome:
    try:
        template_of(folder, template).chat_text(CHAT)
    except BrokenBundleError as error:
        return refused(str(error)) if "was stopped" in str(error) else wrong(str(error))
    return wrong("it ended")


def refuses(template: str, folder: Path) -> Outcome:
    try:
        text = template_of(folder, template).chat_text(CHAT)
    except (BrokenBundleError, UsageError) as error:
        line = str(error)
        return refused(line) if "chat template" in line and "\n" not in line else wrong(line)
    return wrong(f"rendered: {text[:80]!r}")


def cases() -> list[Case]:
    return [
        Case(name, functools.partial(how, template))
        for how, templates in ((rendered, RENDERED), (stopped, STOPPED), (refuses, REFUSED))
        for name, template in templates.items()
    ]
