"""A bundle's tokenizer, with the `tokenizers` library alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_deploy.errors import BrokenBundleError, MissingDependencyError, UsageError
from doge_deploy.text.backend import ids_of, text_of
from doge_deploy.text.files import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    read_config,
    read_template,
    special_tokens,
)
from doge_deploy.text.lengths import check_characters
from doge_deploy.text.literals import Literals
from doge_deploy.text.longest import longest_token
from doge_deploy.text.streams import Detokenizer, Vocabulary

if TYPE_CHECKING:
    import tokenizers

    from doge_deploy.text.templates import ChatTemplate

_IDS = 2**32
"""Ids that the library can be asked for are below it."""


class Tokenizer:
    """A bundle's tokenizer: `encode` and `render_chat` in, `detokenizer` out."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        template: str | None,
        source: Path,
        vocab_size: int | None = None,
    ) -> None:
        """Use `from_directory`.

        Args:
            backend: tokenizer.json; its truncation and padding are turned off.
            config: tokenizer_config.json.
            template: source of the chat template.
            source: the directory, for messages.
            vocab_size: how many tokens the model knows.
        """
        backend.no_truncation()
        backend.no_padding()
        # The one setting of a tokenizer that tokenizer.json has no place for.
        backend.encode_special_tokens = config.get("split_special_tokens") is True
        self._backend = backend
        self._template_source = template
        self._source = source
        self._vocab_size = vocab_size
        self.special_tokens = special_tokens(config)
        """Texts of the special tokens by their role, such as `bos_token`."""

    @classmethod
    def from_directory(cls, path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Read the tokenizer's files in a bundle or checkpoint; only tokenizer.json has to be there.

        Args:
            path: the directory.
            vocab_size: how many tokens the model knows; ids from there up are refused. None: no limit.

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
        config = read_config(path)
        return cls(backend, config, read_template(path, config), path, vocab_size)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, None where there is none."""
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, None where there is none."""
        return self._id("eos_token")

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template, None where there is none."""
        return self._template_source

    def _id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, room: int | None = None) -> list[int]:
        """Ids of a text to be continued; the tokenizer's post-processor puts bos in front.

        An empty text is bos alone, or nothing where there is no bos.

        Args:
            text: while a long one is encoded, other threads run.
            room: tokens that fit. A text that has more whatever its tokens are is not encoded; one that is encoded may
                still have more. None: whatever it has.

        Raises:
            UsageError: `text` holds what is not Unicode text (lone surrogates, from undecodable bytes), a token that
                the model has no embedding for.
            TooLongError: more tokens than there is `room` for.
        """
        ids = self.ids(text, add_special_tokens=True, room=room)
        return ids if ids or self.bos_id is None else [self.bos_id]

    def ids(self, text: str, *, add_special_tokens: bool, room: int | None = None) -> list[int]:
        """Ids of a text, with what the post-processor adds or without; takes and raises what `encode` does."""
        self._check_text(text, room)
        try:
            ids = ids_of(self._backend, text, add_special_tokens=add_special_tokens)
        except Exception as error:  # of a tokenizer without a token for what it does not know
            raise UsageError(f"the tokenizer cannot encode the text: {_one_line(error)}") from error
        self.check_ids(ids)
        return ids

    def _check_text(self, text: str, room: int | None) -> None:
        """Raises UsageError where `text` is no Unicode text, TooLongError where it has more than `room` tokens whatever
        they are.
        """
        if room is not None and self._longest is not None:
            check_characters(len(text), self._longest, room)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid UTF-8: {text[error.start]!r} at character {error.start}") from None

    @cached_property
    def _longest(self) -> int | None:
        return longest_token(self._backend)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises UsageError where the model has no embedding for one of `ids`, whether they come from a text or not."""
        if self._vocab_size is None or not ids or (min(ids) >= 0 and max(ids) < self._vocab_size):
            return
        unknown = next(token for token in ids if not 0 <= token < self._vocab_size)
        text = self._backend.id_to_token(unknown) if 0 <= unknown < _IDS else None
        if text is None:
            raise UsageError(f"token {unknown} is not in the model's vocabulary of {self._vocab_size}")
        raise UsageError(
            f"the prompt holds the token {text!r} with id {unknown}, and the model's vocab_size is {self._vocab_size}: "
            "the checkpoint's tokenizer is larger than its embedding; leave the token out"
        )

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, literal: bool = False, room: int | None = None
    ) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins.

        They are encoded without special tokens, since the template writes bos itself.

        Args:
            messages: each with `role` (system, user or assistant) and `content`.
            literal: the text of a special token in a message stays text; transformers makes the token of it.
            room: as for `encode`.

        Raises:
            UsageError: there is no chat template, or it refuses these messages; what `encode` refuses; with `literal`,
                this tokenizer cannot keep a special token as text.
            BrokenBundleError: the template is broken, or was stopped by a limit.
        """
        if not literal or (typed := self._literals.found(messages)) is None:
            return self.ids(self.chat_text(messages), add_special_tokens=False, room=room)
        mark, marked = self._literals.mark(messages)
        text = self.chat_text(marked)
        self._check_text(text.replace(mark, ""), room)
        # Whether pieces between special tokens are what the whole is, which not every tokenizer grants, shows on the
        # same conversation without what was typed.
        plain = self.chat_text([{**message, "content": "a"} for message in messages])
        if self._literals.ids(plain, mark) != self.ids(plain, add_special_tokens=False):
            raise UsageError(f"the text holds {typed!r}, a special token of this model; leave it out")
        ids = self._literals.ids(text, mark)
        self.check_ids(ids)
        return ids

    @cached_property
    def _literals(self) -> Literals:
        return Literals(self._backend)

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation that `render_chat` encodes, as text; raises the same errors."""
        template = self._chat_template
        from doge_deploy.text.templates import TemplateLimit, TemplateRefusal

        try:
            return template.render(messages, self.special_tokens, add_generation_prompt=True)
        except TemplateRefusal as error:
            raise UsageError(f"the chat template refuses this conversation: {_one_line(error)}") from error
        except TemplateLimit as error:
            raise BrokenBundleError(f"the chat template of {self._source} was stopped: {_one_line(error)}") from error
        except Exception as error:  # whatever the template's own code runs into
            raise self._broken_template(error) from error

    def require_chat(self) -> None:
        """Raises what `render_chat` would raise for lack of a template, before there is a message."""
        _ = self._chat_template

    @cached_property
    def _chat_template(self) -> ChatTemplate:
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
            from doge_deploy.text.templates import ChatTemplate
        except ImportError:
            raise MissingDependencyError("jinja2 is not installed: pip install jinja2") from None
        try:
            return ChatTemplate(self._template_source)
        except Exception as error:  # not only TemplateError: a template that nests too deeply is a RecursionError
            raise self._broken_template(error) from error

    def _broken_template(self, error: Exception) -> BrokenBundleError:
        return BrokenBundleError(
            f"the chat template of {self._source} is broken: {type(error).__name__}: {_one_line(error)}"
        )

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included; while many are decoded, other threads run."""
        return text_of(self._backend, ids)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._backend)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out: what a `detokenizer` gives in the end."""
        return self._vocabulary.decode(list(ids))

    def detokenizer(self) -> Detokenizer:
        """For one stream of generated ids."""
        return Detokenizer(self._vocabulary)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
