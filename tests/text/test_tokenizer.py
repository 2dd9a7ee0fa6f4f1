"""The tokenizer of a bundle against transformers', and text that streams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

import doge_deploy
from doge_deploy.errors import BrokenBundleError, DogeDeployError, UsageError
from doge_deploy.runtime.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, Detokenizer, Tokenizer
from doge_deploy.text.streams import Vocabulary

DOGE_TINY = Path(doge_deploy.__file__).parent / "demo" / "doge-tiny"
BOS, EOS, EOT = 0, 1, 5
TEXTS = {
    "plain": "The import statement",
    "empty": "",
    "blanks": "  two\n\n  lines  ",
    "accents": "déjà vu",
    "chinese": "漢字かな",
    "emoji": "go 👩‍👩‍👧 go 🏳️‍🌈",
    "arabic": "مرحبا",
    "special token": "a<|eot_id|>b",
}
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": " What is 漢字? "},
    {"role": "assistant", "content": "Text."},
    {"role": "user", "content": "And 😀?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DOGE_TINY)


@pytest.fixture(scope="module")
def reference() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(DOGE_TINY)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of doge-tiny's tokenizer files to be changed."""
    for name in (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE):
        shutil.copyfile(DOGE_TINY / name, tmp_path / name)
    return tmp_path


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def one_line(error: pytest.ExceptionInfo[DogeDeployError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


class TestEncode:
    @pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
    def test_as_transformers(self, tokenizer: Tokenizer, reference: Any, text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"]
        assert ids.count(BOS) == 1 and ids[0] == BOS

    def test_special_ids(self, tokenizer: Tokenizer) -> None:
        assert (tokenizer.bos_id, tokenizer.eos_id) == (BOS, EOS)

    def test_special_tokens_written_as_added_tokens(self, directory: Path) -> None:
        change_json(directory / CONFIG_FILE, bos_token={"content": "<|begin_of_text|>", "lstrip": False})
        assert Tokenizer.from_directory(directory).bos_id == BOS

    def test_truncation_and_padding_of_the_file_are_off(self, directory: Path, tokenizer: Tokenizer) -> None:
        backend = Backend.from_file(str(directory / TOKENIZER_FILE))
        backend.enable_truncation(3)
        backend.enable_padding(length=50)
        backend.save(str(directory / TOKENIZER_FILE))
        text = TEXTS["accents"]
        assert Tokenizer.from_directory(directory).encode(text) == tokenizer.encode(text)

    def test_empty_text_is_bos_even_where_no_post_processor_adds_it(self, directory: Path) -> None:
        change_json(directory / TOKENIZER_FILE, post_processor=None)
        assert Tokenizer.from_directory(directory).encode("") == [BOS]

    def test_empty_text_is_nothing_where_there_is_no_bos(self, directory: Path) -> None:
        change_json(directory / TOKENIZER_FILE, post_processor=None)
        change_json(directory / CONFIG_FILE, bos_token=None)
        tokenizer = Tokenizer.from_directory(directory)
        assert tokenizer.encode("") == [] and tokenizer.bos_id is None

    def test_lone_surrogate(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(UsageError) as error:
            tokenizer.encode("ab\udcff")
        assert r"'\udcff' at character 2" in one_line(error)


class TestChat:
    @pytest.mark.parametrize("turns", range(1, len(CHAT) + 1))
    def test_as_transformers(self, tokenizer: Tokenizer, reference: Any, turns: int) -> None:
        ids = tokenizer.render_chat(CHAT[:turns])
        assert ids == reference.apply_chat_template(CHAT[:turns], add_generation_prompt=True)["input_ids"]
        assert ids.count(BOS) == 1

    @pytest.mark.parametrize(
        "template",
        [
            "{% if tools is not none %}tools{% endif %}{% if not documents %}no documents{% endif %}",
            "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
            "{{ messages | tojson }}{{ {'a': '<&>é'} | tojson(indent=1) }}",
            "{% generation %}\n  {{ messages[0].content }}\n{% endgeneration %}!",
            "{% set a = namespace(n=0) %}{% for m in messages %}{% set a.n = a.n + 1 %}{% endfor %}{{ a.n }}",
            " {% if add_generation_prompt %}\n{{ bos_token }}{{ eos_token }}{{ unk_token }}\n {% endif %}\n",
            "{{ strftime_now('%Y') | length }}",
        ],
        ids=[
            "tools",
            "loop controls",
            "tojson",
            "generation",
            "namespace",
            "blanks and tokens",
            "strftime_now",
        ],
    )
    def test_what_templates_may_use(self, directory: Path, template: str) -> None:
        (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        expected = render_jinja_template(
            [CHAT],
            chat_template=template,
            add_generation_prompt=True,
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
        )
        rendered = expected[0][0] if isinstance(expected, tuple) else expected[0]
        assert Tokenizer.from_directory(directory).chat_text(CHAT) == rendered

    @pytest.mark.parametrize(
        "key",
        [
            "{{ messages[0].content }}",
            [{"name": "tool_use", "template": "?"}, {"name": "default", "template": "d"}],
        ],
        ids=["one", "several"],
    )
    def test_template_in_the_config(self, directory: Path, key: Any) -> None:
        (directory / TEMPLATE_FILE).unlink()
        change_json(directory / CONFIG_FILE, chat_template=key)
        expected = "Be short." if isinstance(key, str) else "d"
        assert Tokenizer.from_directory(directory).chat_text(CHAT) == expected

    def test_file_goes_before_the_config(self, directory: Path) -> None:
        change_json(directory / CONFIG_FILE, chat_template="from the config")
        (directory / TEMPLATE_FILE).write_text("from the file", encoding="utf-8")
        assert Tokenizer.from_directory(directory).chat_text(CHAT) == "from the file"

    def test_no_template(self, directory: Path) -> None:
        (directory / TEMPLATE_FILE).unlink()
        tokenizer = Tokenizer.from_directory(directory)
        assert tokenizer.encode("text")
        with pytest.raises(UsageError) as error:
            tokenizer.require_chat()
        assert f"no {TEMPLATE_FILE}" in one_line(error)

    def test_refusal_by_the_template(self, directory: Path) -> None:
        (directory / TEMPLATE_FILE).write_text("{{ raise_exception('roles must\nalternate') }}", encoding="utf-8")
        with pytest.raises(UsageError) as error:
            Tokenizer.from_directory(directory).render_chat(CHAT)
        assert one_line(error) == "the chat template refuses this conversation: roles must alternate"

    @pytest.mark.parametrize(
        "template",
        [
            "{% if %}",
            "{{ messages[0].content + 1 }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ messages.append(1) }}",
            "{% include 'other' %}",
        ],
        ids=["syntax", "type error", "sandbox", "immutable", "include"],
    )
    def test_broken_template(self, directory: Path, template: str) -> None:
        (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        with pytest.raises(BrokenBundleError) as error:
            Tokenizer.from_directory(directory).render_chat(CHAT)
        assert "chat template" in one_line(error)


class TestBrokenFiles:
    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            (TOKENIZER_FILE, None, f"has no {TOKENIZER_FILE}"),
            (TOKENIZER_FILE, b"{}", "is not a tokenizer"),
            (CONFIG_FILE, b"{", "is not JSON"),
            (CONFIG_FILE, b"[]", "a JSON object is needed"),
            (CONFIG_FILE, b"\xff", "is not JSON"),
            (TEMPLATE_FILE, b"\xff", "is not UTF-8"),
        ],
        ids=["missing", "no tokenizer", "cut config", "list as config", "binary config", "binary template"],
    )
    def test_is_named(self, directory: Path, name: str, content: bytes | None, says: str) -> None:
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)
        with pytest.raises(BrokenBundleError, match=says) as error:
            Tokenizer.from_directory(directory)
        assert name in one_line(error)

    def test_config_may_be_missing(self, directory: Path) -> None:
        (directory / CONFIG_FILE).unlink()
        assert Tokenizer.from_directory(directory).encode("a")[0] == BOS

    def test_template_that_is_no_text(self, directory: Path) -> None:
        (directory / TEMPLATE_FILE).unlink()
        change_json(directory / CONFIG_FILE, chat_template=3)
        with pytest.raises(BrokenBundleError, match="chat_template is not a text"):
            Tokenizer.from_directory(directory)


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


class TestDetokenizer:
    BACKEND = Backend.from_file(str(DOGE_TINY / TOKENIZER_FILE))

    @pytest.mark.parametrize("character", ["é", "漢", "😀"], ids=["2 bytes", "3 bytes", "4 bytes"])
    def test_a_character_comes_whole_with_its_last_token(self, tokenizer: Tokenizer, character: str) -> None:
        ids = tokenizer.encode(f"a{character}b")[1:]
        assert len(ids) == 2 + len(character.encode()), "the text must be one token a byte"
        silent = [""] * (len(character.encode()) - 1)
        assert stream(tokenizer.detokenizer(), ids) == ["a", *silent, character, "b", ""]

    @settings(deadline=None)
    @given(st.text())
    def test_text_comes_back(self, text: str) -> None:
        ids = self.BACKEND.encode(text, add_special_tokens=False).ids
        pieces = stream(Detokenizer(Vocabulary(self.BACKEND)), ids)
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text

    @settings(deadline=None)
    @given(st.lists(st.one_of(st.integers(0, 1023), st.integers(128, 261))))
    def test_any_ids_join_to_the_text_of_all(self, ids: list[int]) -> None:
        assert "".join(stream(Detokenizer(Vocabulary(self.BACKEND)), ids)) == self.BACKEND.decode(ids)

    def test_unfinished_character_at_the_end(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("a漢")[1:-1]
        assert stream(tokenizer.detokenizer(), ids) == ["a", "", "", "\ufffd"]

    def test_broken_character_in_the_middle(self, tokenizer: Tokenizer) -> None:
        ids = [*tokenizer.encode("漢")[1:3], *tokenizer.encode("ok")[1:]]
        pieces = stream(tokenizer.detokenizer(), ids)
        assert "".join(pieces) == "\ufffdok" and pieces[:2] == ["", ""]

    def test_special_tokens_are_left_out(self, tokenizer: Tokenizer) -> None:
        ids = [BOS, *tokenizer.encode("a")[1:], EOT, *tokenizer.encode("b")[1:], EOS]
        assert "".join(stream(tokenizer.detokenizer(), ids)) == "ab"

    def test_streams_do_not_share_state(self, tokenizer: Tokenizer) -> None:
        first, second = tokenizer.detokenizer(), tokenizer.detokenizer()
        *head, last = tokenizer.encode("漢")[1:]
        for token in head:
            assert first.push(token) == ""
        assert second.push(last) == ""
        assert first.push(last) == "漢"


class TestIds:
    """Ids that are no text's: those that a client sends."""

    @pytest.mark.parametrize("unknown", [-1, 1000, 1023, 2**31, 2**32, 2**70])
    def test_of_no_embedding(self, unknown: int) -> None:
        tokenizer = Tokenizer.from_directory(DOGE_TINY, vocab_size=1000)
        with pytest.raises(UsageError, match=rf"{unknown}.*\b1000\b") as error:
            tokenizer.check_ids([5, 999, unknown, 2000])
        assert "\n" not in str(error.value)
        named = "the prompt holds the token" in str(error.value)
        assert named == (unknown in (1000, 1023)), "a token of the tokenizer is named by its text"

    def test_that_are_known(self) -> None:
        Tokenizer.from_directory(DOGE_TINY, vocab_size=1000).check_ids([0, 999])
        Tokenizer.from_directory(DOGE_TINY, vocab_size=1000).check_ids([])
        Tokenizer.from_directory(DOGE_TINY).check_ids([2000])
