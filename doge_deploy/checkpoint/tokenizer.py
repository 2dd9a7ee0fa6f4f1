"""The tokenizer of a checkpoint, whole: what transformers reads from many files, in the one that a bundle needs.

transformers' AutoTokenizer is the reference. Where what a bundle reads of the checkpoint's files (`doge_deploy.text`)
gives the same ids, special tokens and template, the files are taken as they are. Where it does not, tokenizer.json is
written from the reference, with a tokenizer_config.json that says what is left to say, and is compared again; where it
still differs the checkpoint is refused.

What tells them apart is a corpus of hard strings. It is made from the checkpoint too: the text of every added token,
alone and within a sentence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from doge_deploy.checkpoint.headers import read_json
from doge_deploy.checkpoint.read import Checkpoint
from doge_deploy.errors import BrokenBundleError, DogeDeployError, UnsupportedModelError, UsageError
from doge_deploy.text.files import CONFIG_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE, TOKENIZER_FILE, read_template
from doge_deploy.text.tokenizer import Tokenizer

VOCABULARY_FILES = (
    TOKENIZER_FILE,
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)
"""Files of which a tokenizer has at least one."""
_ADDED_TOKENS_FILE = "added_tokens.json"
OTHER_FILES = (CONFIG_FILE, SPECIAL_TOKENS_FILE, _ADDED_TOKENS_FILE, TEMPLATE_FILE, "merges.txt")
"""Files of a tokenizer that are of no use without one of those."""

_NAMED = 5
"""Tokens beyond the embedding that a warning names; the others are counted."""

_MESSAGES: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "hi"},),
    (
        {"role": "system", "content": " Be short. "},
        {"role": "user", "content": "What is 漢字?\n\n"},
        {"role": "assistant", "content": "Text."},
        {"role": "user", "content": "And 😀?"},
    ),
)
"""Conversations that are rendered; a template may refuse the one with a system message."""

_TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\r\n\r\n \n",
    "\t\ttabs\tand  two blanks ",
    " leading and trailing ",
    "The quick brown fox, it's 1,234.56 o'clock: don't!?",
    "UPPER lower Title ÀÉÎÕÜ àéîõü ß İı ﬁ",
    "def f(x):\n    return x ** 2  # comment\n",
    "https://example.org/a?b=c&d=%20 user@host",
    "漢字かなカナ한국어 中文。「引用」",
    "مرحبا بالعالم שלום नमस्ते ไทย",
    "e\u0301 n\u0303 a\u0323\u0302 \u1e69",
    "👩‍👩‍👧 🏳️‍🌈 👍🏽 🇩🇪 ❤️",
    "zero\u200bwidth\u200djoin\u2060er\ufeffbom\u00adsoft",
    "no\u00a0break\u2003em\u3000ideographic\u2028line\u2029paragraph\u0085next",
    "".join(map(chr, range(0x20))) + "\x7f",
    "".join(map(chr, range(0x80, 0x100))),
    "\ufffd\ufffe\U0010ffff\ue000",
    "\u2581under\u2581 Ġbyte Ċ ## <0x41> <0xE6>",
    "½ ² ⅷ ① Ω ∑ ‰ €",
    "a" * 300 + " " * 40 + "b\n" * 50,
    "word " * 400,
)
_BYTES = tuple(
    # every byte that UTF-8 can hold, as first and as later byte of a character
    "".join(chr(code) for code in range(start, end, step) if not 0xD800 <= code < 0xE000)
    for start, end, step in ((0, 0x80, 1), (0x80, 0x800, 37), (0x800, 0x10000, 1009), (0x10000, 0x110000, 16381))
)


def check_tokenizer_files(checkpoint: Path) -> bool:
    """Whether a checkpoint has a tokenizer.

    Raises:
        UnsupportedModelError: it has some of its files, and no vocabulary.
    """
    if any((checkpoint / name).is_file() for name in VOCABULARY_FILES):
        return True
    lone = [name for name in OTHER_FILES if (checkpoint / name).is_file()]
    if lone:
        raise UnsupportedModelError(
            f"{checkpoint}: {lone[0]} is there, and no vocabulary for it; a tokenizer needs {TOKENIZER_FILE}, "
            "vocab.json with merges.txt, or tokenizer.model (without a tokenizer, remove it)"
        )
    return False


def write_tokenizer(opened: Checkpoint, bundle: Path) -> tuple[str, ...]:
    """Put the companion files of a checkpoint into a bundle, its tokenizer as it is or in one tokenizer.json.

    Returns:
        Warnings: tokens beyond the embedding, a template that fails, text that transformers would tidy up.

    Raises:
        UnsupportedModelError: transformers cannot load the tokenizer without running code of the checkpoint, or gives
            ids that `tokenizers` alone cannot give.
    """
    checkpoint = opened.path
    if not check_tokenizer_files(checkpoint):
        _copy(opened.companion_files, bundle)
        return ()
    with _quiet():
        reference = _load(checkpoint)
        warnings = _write_checked(opened, reference, bundle)
    return (*warnings, *_template_warnings(bundle, reference))


def encode(opened: Checkpoint, text: str) -> list[int] | None:
    """The ids of a text in the checkpoint's tokenizer, without special tokens; None where it has no tokenizer.

    Raises:
        UnsupportedModelError: transformers cannot load the tokenizer.
    """
    if not check_tokenizer_files(opened.path):
        return None
    with _quiet():
        return _reference_ids(_load(opened.path), text, add_special_tokens=False)


def _write_checked(opened: Checkpoint, reference: Any, bundle: Path) -> list[str]:
    """The files, equal to the reference in every string of the corpus; warnings."""
    checkpoint, files = opened.path, opened.companion_files
    warnings = list(_beyond(reference, opened.facts.vocab_size))
    if reference.clean_up_tokenization_spaces and type(reference.backend_tokenizer.model).__name__ != "BPE":
        warnings.append(
            "clean_up_tokenization_spaces=True: transformers takes blanks before punctuation out of generated text; "
            "here they stay"
        )
    if (checkpoint / TOKENIZER_FILE).is_file() and _difference(checkpoint, reference) is None:
        _copy(files, bundle)
    else:
        of_tokenizer = {*VOCABULARY_FILES, *OTHER_FILES}
        _copy([file for file in files if file.name not in of_tokenizer], bundle)
        _write(reference, bundle)
        if (difference := _difference(bundle, reference)) is not None:
            raise UnsupportedModelError(
                f"{checkpoint}: the tokenizer, a {type(reference).__name__}, gives what {TOKENIZER_FILE} cannot say: "
                f"{difference}"
            )
    return warnings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks, about the length of the corpus for example."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _copy(files: Sequence[Path], bundle: Path) -> None:
    for file in files:
        shutil.copyfile(file, bundle / file.name)


_READ = {".json", ".txt", ".model", ".jinja"}


def _load(checkpoint: Path) -> Any:
    """transformers' tokenizer of the checkpoint. Nothing of it is run, and nothing is fetched."""
    from transformers import AutoTokenizer

    for name in (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, _ADDED_TOKENS_FILE):
        if (checkpoint / name).is_file():
            read_json(checkpoint / name)
    read_template(checkpoint, {})  # that it is a text
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file in checkpoint.iterdir():
                if (file.suffix in _READ and file.name != "config.json") or file.name == _MORE_TEMPLATES:
                    (folder / file.name).symlink_to(file.resolve())
            # The keys of an early Doge are not what transformers can read; these are all that a tokenizer needs.
            (folder / "config.json").write_text(json.dumps(_model_config(checkpoint)), encoding="utf-8")
            reference = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what is wrong with a file shows in as many ways as there are classes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        if "custom code" in reason:
            raise UnsupportedModelError(
                f"{checkpoint / CONFIG_FILE}: auto_map names code for the tokenizer, and such code is not run; "
                f"save the tokenizer as a {TOKENIZER_FILE}, and leave auto_map out"
            ) from error
        files = [name for name in (*VOCABULARY_FILES, *OTHER_FILES) if (checkpoint / name).is_file()]
        needs = "; a .model file takes the package sentencepiece or tiktoken" if "tiktoken" in reason else ""
        if TOKENIZER_FILE not in files:
            needs += f" (with a {TOKENIZER_FILE} none of these is needed)"
        raise UnsupportedModelError(
            f"{checkpoint}: transformers cannot load the tokenizer of {', '.join(files)}: {reason}{needs}"
        ) from error
    if getattr(reference, "backend_tokenizer", None) is None:
        raise UnsupportedModelError(
            f"{checkpoint}: the tokenizer is a {type(reference).__name__}, which is not of the tokenizers library; "
            f"it needs a {TOKENIZER_FILE}"
        )
    _check_vocabulary(checkpoint, reference)
    return reference


def _check_vocabulary(checkpoint: Path, reference: Any) -> None:
    """Raises UnsupportedModelError where the class of the tokenizer reads none of the vocabulary files that are there.

    transformers then makes a tokenizer of a few special tokens.
    """
    there = [name for name in VOCABULARY_FILES if (checkpoint / name).is_file()]
    read = sorted({*type(reference).vocab_files_names.values(), *_READ_BY_ALL})
    if not set(there) & set(read):
        raise UnsupportedModelError(
            f"{checkpoint}: the tokenizer is a {type(reference).__name__}, which does not read {', '.join(there)}; it "
            f"reads {', '.join(read)}"
        )


_READ_BY_ALL = (TOKENIZER_FILE, "tokenizer.model", "tiktoken.model", "tekken.json")

_MORE_TEMPLATES = "additional_chat_templates"


def _model_config(checkpoint: Path) -> dict[str, Any]:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return {"model_type": "doge", **{key: config[key] for key in ("tokenizer_class",) if key in config}}


def _template(reference: Any) -> str | None:
    """The template of the reference that is taken without tools."""
    template = reference.chat_template
    return template.get("default") if isinstance(template, Mapping) else template


def _write(reference: Any, bundle: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the template, from transformers' tokenizer."""
    reference.backend_tokenizer.no_truncation()
    reference.backend_tokenizer.no_padding()
    reference.backend_tokenizer.save(str(bundle / TOKENIZER_FILE))
    named = dict(reference.special_tokens_map)
    config: dict[str, Any] = {
        # the class that takes tokenizer.json as it is, under the name that every version of transformers knows
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": bool(reference.clean_up_tokenization_spaces),
        "model_max_length": reference.model_max_length,
        "padding_side": reference.padding_side,
        "split_special_tokens": bool(reference.split_special_tokens),
        **{role: token for role, token in named.items() if role.endswith("_token")},
    }
    if others := {role: token for role, token in named.items() if role not in config}:
        config["extra_special_tokens"] = others
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (bundle / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if (template := _template(reference)) is not None:
        (bundle / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _difference(directory: Path, reference: Any) -> str | None:
    """What a bundle's tokenizer would do otherwise than the reference with the files of `directory`; None: nothing."""
    try:
        own = Tokenizer.from_directory(directory)
    except BrokenBundleError as error:
        return str(error)
    if own.special_tokens != reference.special_tokens_map:
        roles = {*own.special_tokens, *reference.special_tokens_map}
        unequal = (
            role for role in sorted(roles) if own.special_tokens.get(role) != reference.special_tokens_map.get(role)
        )
        role = next(unequal)
        return f"{role} is {own.special_tokens.get(role)!r} instead of {reference.special_tokens_map.get(role)!r}"
    if own.chat_template != _template(reference):
        return "the chat template is another"
    for text in _corpus(reference):
        for special in (True, False):
            expected = _reference_ids(reference, text, add_special_tokens=special)
            if (found := _own_ids(own, text, add_special_tokens=special)) != expected:
                return f"{_shortened(text)} is {_apart(found, expected)}"
        if expected is None:
            continue
        decoded = reference.backend_tokenizer.decode(expected, skip_special_tokens=True)
        if (text_found := own.decode(expected)) != decoded:
            return f"{_shortened(text)} comes back as {_shortened(text_found)} instead of {_shortened(decoded)}"
    for messages in _MESSAGES if own.chat_template is not None else ():
        try:
            found = own.render_chat(messages)
        except DogeDeployError:
            continue  # a template that is stopped here might never end there
        expected = reference.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        if found != expected:
            return f"a conversation of {len(messages)} messages is {_apart(found, expected)}"
    return None


def _apart(found: Sequence[int] | None, expected: Sequence[int] | None) -> str:
    if found is None or expected is None:
        return f"{'refused' if found is None else 'taken'}, and {'refused' if expected is None else 'taken'} there"
    same = min(len(found), len(expected))
    start = next((place for place in range(same) if found[place] != expected[place]), same)
    return f"{found[start : start + 5]} instead of {expected[start : start + 5]} from token {start} on"


def _reference_ids(reference: Any, text: str, *, add_special_tokens: bool) -> list[int] | None:
    """None where the reference cannot encode the text: tokenizers without a token for what they do not know."""
    try:
        ids: list[int] = reference(text, add_special_tokens=add_special_tokens)["input_ids"]
    except Exception:  # the library raises nothing narrower
        return None
    return ids


def _own_ids(own: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int] | None:
    try:
        return own.ids(text, add_special_tokens=add_special_tokens)
    except UsageError:
        return None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _corpus(reference: Any) -> Iterator[str]:
    """Hard strings, those with the added tokens of this tokenizer first: a difference there names the token."""
    for token in reference.added_tokens_decoder.values():
        yield token.content
        yield f"a {token.content} b{token.content}c  {token.content}\n{token.content}"
    yield from _TEXTS
    yield from _BYTES


def _beyond(reference: Any, vocab_size: int) -> Iterator[str]:
    """Tokens that the model has no embedding for."""
    beyond = sorted((index, token) for token, index in reference.get_vocab().items() if index >= vocab_size)
    if beyond:
        named = ", ".join(f"{token!r} ({index})" for index, token in beyond[:_NAMED])
        more = f" and {len(beyond) - _NAMED} more" if len(beyond) > _NAMED else ""
        yield (
            f"the tokenizer knows tokens beyond vocab_size={vocab_size}, which the model has no embedding for: "
            f"{named}{more}; a prompt that holds one is refused"
        )


def _template_warnings(bundle: Path, reference: Any) -> Iterator[str]:
    if reference.chat_template and _template(reference) is None:
        named = ", ".join(sorted(reference.chat_template))
        yield f"no chat template is named 'default' ({named}): without tools transformers takes none of them"
    own = Tokenizer.from_directory(bundle)
    if own.chat_template is None:
        return
    try:
        own.chat_text(_MESSAGES[0])
    except UsageError:
        pass  # a refusal in the template's own words, which another conversation may not meet
    except BrokenBundleError as error:
        yield str(error).replace(f" of {bundle}", "")
