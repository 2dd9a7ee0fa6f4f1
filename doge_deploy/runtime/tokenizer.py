"""Text to ids and back, from the tokenizer files of a bundle, with the `tokenizers` library alone.

The chat template comes with a checkpoint, so it is not to be trusted: it runs in jinja2's immutable sandbox,
where it reaches nothing but the values passed to it.

Reference: transformers/utils/chat_template_utils.py, whose names and helpers templates rely on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from doge_deploy.errors import BrokenBundleError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    import jinja2
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""Keys of tokenizer_config.json that a chat template may use."""


class Tokenizer:
    """A bundle's tokenizer: `encode` and `render_chat` in, `detokenizer` out."""

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], template: str | None, source: Path
    ) -> None:
        """Use `from_directory`.

        Args:
            backend: tokenizer.json; its truncation and padding are turned off.
            config: tokenizer_config.json.
            template: source of the chat template.
            source: the directory, for messages.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template_source = template
        self._source = source
        self.special_tokens = {
            key: token for key in _SPECIAL_TOKENS if (token := _token_text(config.get(key))) is not None
        }
        """Texts of the special tokens by their role, such as `bos_token`."""

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja; only the first has to be there.

        Raises:
            BrokenBundleError: tokenizer.json is missing, or a file cannot be read.
            MissingDependencyError: `tokenizers` is not installed.
        """
        path = Path(path)
        try:
            import tokenizers
        except ImportError:
            raise MissingDependencyError("tokenizers is not installed: pip install tokenizers") from None
        file = path / TOKENIZER_FILE
        if not file.is_file():
            raise BrokenBundleError(
                f"{path} has no {TOKENIZER_FILE}, which text needs; export a checkpoint that holds one"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise BrokenBundleError(f"{file} is not a tokenizer: {_one_line(error)}") from error
        config = _read_config(path / CONFIG_FILE)
        return cls(backend, config, _read_template(path / TEMPLATE_FILE, config), path)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, None where there is none."""
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, None where there is none."""
        return self._id("eos_token")

    def _id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text to be continued; the tokenizer's post-processor puts bos in front.

        An empty text is bos alone, or nothing where there is no bos.

        Raises:
            UsageError: `text` holds what is not Unicode text (lone surrogates, from undecodable bytes).
        """
        ids = self._encode(text, add_special_tokens=True)
        return ids if ids or self.bos_id is None else [self.bos_id]

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid UTF-8: {text[error.start]!r} at character {error.start}") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins.

        They are encoded without special tokens, since the template writes bos itself.

        Args:
            messages: each with `role` (system, user or assistant) and `content`.

        Raises:
            UsageError: there is no chat template, or it refuses these messages.
            BrokenBundleError: the template is broken.
        """
        return self._encode(self.chat_text(messages), add_special_tokens=False)

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation that `render_chat` encodes, as text; raises the same errors."""
        template = self._chat_template
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                # Templates ask whether these are none, which what is undefined is not.
                tools=None,
                documents=None,
                **self.special_tokens,
            )
        except _TemplateRefusal as error:
            raise UsageError(f"the chat template refuses this conversation: {_one_line(error)}") from error
        except Exception as error:  # whatever the template's own code runs into
            raise self._broken_template(error) from error

    def require_chat(self) -> None:
        """Raises what `render_chat` would raise for lack of a template, before there is a message."""
        _ = self._chat_template

    @cached_property
    def _chat_template(self) -> jinja2.Template:
        """The compiled chat template.

        Raises:
            UsageError: there is none.
            BrokenBundleError: it is not a template.
            MissingDependencyError: jinja2 is not installed.
        """
        if self._template_source is None:
            raise UsageError(
                f"{self._source} has no {TEMPLATE_FILE} and no chat_template in {CONFIG_FILE};"
                " give a plain prompt, without --chat"
            )
        try:
            import jinja2
        except ImportError:
            raise MissingDependencyError("jinja2 is not installed: pip install jinja2") from None
        try:
            return _template_environment().from_string(self._template_source)
        except jinja2.TemplateError as error:
            raise self._broken_template(error) from error

    def _broken_template(self, error: Exception) -> BrokenBundleError:
        return BrokenBundleError(
            f"the chat template of {self._source} is broken: {type(error).__name__}: {_one_line(error)}"
        )

    def detokenizer(self) -> Detokenizer:
        """For one stream of generated ids."""
        return Detokenizer(self._backend)


class Detokenizer:
    """Ids to text as they come; the pieces joined are the text of all ids, special tokens left out.

    The library's stream decodes only the few ids since the last complete character, and holds back what ends
    within a UTF-8 character.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []
        """Ids whose text was not given out yet."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty where it ends within a character."""
        self._pending.append(token_id)
        piece = self._stream.step(self._backend, token_id)
        if piece is None:
            return ""
        self._pending.clear()
        return piece

    def flush(self) -> str:
        """The rest, an unfinished character as U+FFFD. To be called once, after the last id."""
        return self._backend.decode(self._pending, skip_special_tokens=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _token_text(value: object) -> str | None:
    """A special token is written as a text or as the fields of an AddedToken."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenBundleError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BrokenBundleError(f"{file} holds a {type(config).__name__}; a JSON object is needed")
    return config


def _read_template(file: Path, config: Mapping[str, Any]) -> str | None:
    """The file goes before the key, as in transformers; of several templates "default" counts."""
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BrokenBundleError(f"{file} is not UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next((entry.get("template") for entry in named), None)
    if template is not None and not isinstance(template, str):
        raise BrokenBundleError(f"{file.parent / CONFIG_FILE}: chat_template is not a text")
    return template


class _TemplateRefusal(Exception):
    """The template called `raise_exception`: these messages are not what the model was trained on."""


def _template_environment() -> jinja2.Environment:
    """What transformers offers to templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's words for training; here they are as all others."""

        tags = {"generation"}  # noqa: RUF012 (an attribute of the base class)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise _TemplateRefusal(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        """jinja2's own filter escapes what is special in HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
