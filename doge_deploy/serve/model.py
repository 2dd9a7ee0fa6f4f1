"""A bundle that is served: its tokenizer, its engine, and how a request's options become a `Request`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from doge_deploy.bundle.opening import Bundle
from doge_deploy.errors import UsageError
from doge_deploy.options.generation import GENERATION_CONFIG, GenerationOptions
from doge_deploy.runtime.sampling import Sampler
from doge_deploy.serve.engine import Engine
from doge_deploy.serve.grammar.compiler import Grammar, GrammarCompiler
from doge_deploy.serve.grammar.desk import GrammarDesk
from doge_deploy.serve.grammar.trial import Trial
from doge_deploy.serve.request import Event, Request
from doge_deploy.serve.text import StreamedText
from doge_deploy.serve.tokens import TokenTexts
from doge_deploy.text.files import TOKENIZER_FILE
from doge_deploy.text.lengths import check_length
from doge_deploy.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answering:
    """How the answers of one request are made, the same for each of its choices."""

    options: GenerationOptions
    logprobs: int | None = None
    score_prompt: bool = False
    grammar: Grammar | None = None


class ServedText:
    """A bundle of task causal-lm.

    Args:
        name: what clients call it.
        bundle: opened and checked.
        engine: runs its requests; started by whoever makes it.
        all_logits: whether the bundle gives the logits of every token, which `echo` with `logprobs` needs.
    """

    def __init__(self, name: str, bundle: Bundle, engine: Engine, *, all_logits: bool) -> None:
        self.name, self.bundle, self.engine, self.all_logits = name, bundle, engine, all_logits
        self.tokenizer = Tokenizer.from_directory(bundle.path, vocab_size=bundle.manifest.facts.vocab_size)
        self._config = bundle.read_json(GENERATION_CONFIG)
        self._eos_ids = self._merged({}).eos_ids  # what is wrong in the file shows at the start
        self.grammars = GrammarDesk(lambda: self.compiler, Trial(*self._for_grammars))

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt; with its answer it may have one more, since the last token needs no place."""
        return self.bundle.manifest.max_length

    @cached_property
    def compiler(self) -> GrammarCompiler:
        """Made when it is first used: it takes a moment. Grammars of requests come from `grammars`."""
        return GrammarCompiler(*self._for_grammars)

    @property
    def _for_grammars(self) -> tuple[Path, int, Collection[int]]:
        return self.bundle.path / TOKENIZER_FILE, self.bundle.manifest.facts.vocab_size, self._eos_ids

    @cached_property
    def token_texts(self) -> TokenTexts:
        """For logprobs."""
        return TokenTexts(self.compiler.tokenizer)

    def options(self, asked: Mapping[str, Any], prompt_tokens: int, default_tokens: int | None) -> GenerationOptions:
        """Generation options: the bundle's, then those that were asked for; a length that fits.

        Args:
            asked: in the names of generation_config.json; None for what was not given.
            prompt_tokens: of the prompt.
            default_tokens: tokens of an answer where nobody says; all that fit where None.

        Raises:
            UsageError: a value is not legal.
        """
        room = self.max_length + 1 - prompt_tokens
        length = asked.get("max_new_tokens") or self._config.get("max_new_tokens") or default_tokens or room
        options = self._merged({**asked, "max_new_tokens": 1})
        return replace(options, max_new_tokens=max(min(length, room), 1))

    def _merged(self, asked: Mapping[str, Any]) -> GenerationOptions:
        facts, file = self.bundle.manifest.facts, self.bundle.path / GENERATION_CONFIG
        return GenerationOptions.with_file(
            self._config, asked, eos_ids=facts.eos_token_ids, source=file, vocab_size=facts.vocab_size
        )

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt that can be answered. A text that cannot fit whatever its tokens are is not encoded.

        Raises:
            UsageError: as `check_prompt`.
        """
        ids = self.tokenizer.encode(prompt, room=self.max_length) if isinstance(prompt, str) else list(prompt)
        self.check_prompt(ids)
        return ids

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Whether a prompt can be answered.

        Raises:
            UsageError: it is empty, too long, or holds a token that the model has not.
        """
        if not ids:
            raise UsageError("the prompt is empty and the tokenizer has no bos token; give at least one token")
        check_length(len(ids), self.max_length)
        self.tokenizer.check_ids(ids)

    def request(self, name: str, prompt_ids: Sequence[int], answering: Answering, choice: int = 0) -> Request:
        """A request for one choice; each has random numbers of its own."""
        sampling = answering.options.sampling
        if sampling.seed is not None and choice:
            sampling = replace(sampling, seed=sampling.seed + choice)
        return Request(
            id=name,
            prompt_ids=prompt_ids,
            sampler=Sampler(sampling),
            max_new_tokens=answering.options.max_new_tokens,
            send=_nowhere,
            text=StreamedText(self.tokenizer.detokenizer(), answering.options.stop),
            eos_ids=answering.options.eos_ids,
            logprobs=answering.logprobs,
            speculate=answering.logprobs is None,  # whoever asks for numbers gets the same ones each time
            score_prompt=answering.score_prompt,
            constraint=None if answering.grammar is None else answering.grammar.copy(),
        )


def _nowhere(event: Event) -> None:
    """Until the engine takes the request."""
