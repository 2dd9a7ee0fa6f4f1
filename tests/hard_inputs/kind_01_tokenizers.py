"""Tokenizers of every family, with added tokens in every file that transformers reads them from.

What the bundle's tokenizer does is compared with AutoTokenizer on the checkpoint as it was.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.tokenizer import write_tokenizer
from doge_deploy.errors import DogeDeployError, UnsupportedModelError, UsageError
from doge_deploy.text.tokenizer import Tokenizer
from hard_inputs.frame import Case, Outcome, demo_copy, refused, right, wrong
from hard_inputs.tokenizers_made import FAMILIES, saved

KIND = "1 tokenizers"

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{{ tool_token }}{% endfor %}"
)
CHAT = [{"role": "user", "content": " hi <tool> 漢字\n"}, {"role": "assistant", "content": "<x>"}]

Files = dict[str, Any]
"""Parsed JSON by file name; None takes a file away, bytes are written as they are."""


def _added(content: str, *, special: bool = True, **more: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"content": content, **flags, **more}


def _config(files: Files, **keys: Any) -> None:
    files["tokenizer_config.json"] |= keys


def plain(files: Files) -> None:
    """As it was saved."""


def in_tokenizer_json(files: Files) -> None:
    document = files["tokenizer.json"]
    beyond = _size(document)
    document["added_tokens"] += [
        {"id": beyond, **_added("<tool>")},
        {"id": beyond + 1, **_added("<x>", special=False, lstrip=True)},
    ]


def in_added_tokens_json(files: Files) -> None:
    size = _size(files["tokenizer.json"])
    files["added_tokens.json"] = {"<tool>": size, "<x>": size + 1}


def in_special_tokens_map(files: Files) -> None:
    config = files["tokenizer_config.json"]
    roles = {role: config.pop(role) for role in list(config) if role.endswith("_token")}
    files["special_tokens_map.json"] = {
        **roles,
        "bos_token": {"content": "<tool>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False},
        "additional_special_tokens": ["<x>"],
    }


def in_added_tokens_decoder(files: Files) -> None:
    size = _size(files["tokenizer.json"])
    decoder = {
        str(entry["id"]): {k: v for k, v in entry.items() if k != "id"}
        for entry in files["tokenizer.json"]["added_tokens"]
    }
    decoder |= {str(size): _added("<tool>", rstrip=True), str(size + 1): _added("<x>", special=False)}
    _config(files, added_tokens_decoder=decoder)


def in_additional_special_tokens(files: Files) -> None:
    _config(files, additional_special_tokens=["<tool>", "<x>"])


def in_extra_special_tokens(files: Files) -> None:
    _config(files, extra_special_tokens=["<tool>", "<x>"])


def in_named_extra_tokens(files: Files) -> None:
    _config(files, extra_special_tokens={"tool_token": "<tool>", "other": "<x>"})


def as_named_role(files: Files) -> None:
    _config(
        files,
        bos_token="<tool>",
        tool_token="<x>",
        eos_token=_added("<end of it>", lstrip=True) | {"__type": "AddedToken"},
    )


def split(files: Files) -> None:
    _config(files, split_special_tokens=True)


def another_class(files: Files) -> None:
    """The class replaces what stands before and after the vocabulary in tokenizer.json."""
    config = files["tokenizer_config.json"]
    kind = files["tokenizer.json"]["model"]["type"]
    classes = {"BPE": "Qwen2Tokenizer", "Unigram": "T5Tokenizer", "WordPiece": "DistilBertTokenizer"}
    config["tokenizer_class"] = classes.get(kind, "PreTrainedTokenizer")


def vocabulary_alone(files: Files) -> None:
    """vocab.json and merges.txt, vocab.txt, or nothing that can be read."""
    model = files.pop("tokenizer.json")["model"]
    files["tokenizer.json"] = None
    if model["type"] == "BPE":
        files["vocab.json"] = model["vocab"]
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        files["merges.txt"] = ("#version: 0.2\n" + "\n".join(merges) + "\n").encode()
    elif model["type"] == "WordPiece":
        files["vocab.txt"] = ("\n".join(sorted(model["vocab"], key=model["vocab"].__getitem__)) + "\n").encode()


PLACES: tuple[Callable[[Files], None], ...] = (
    plain,
    in_tokenizer_json,
    in_added_tokens_json,
    in_special_tokens_map,
    in_added_tokens_decoder,
    in_additional_special_tokens,
    in_extra_special_tokens,
    in_named_extra_tokens,
    as_named_role,
    split,
    another_class,
    vocabulary_alone,
)


def _size(document: Any) -> int:
    vocab = document["model"]["vocab"]
    return (
        max(len(vocab), *(entry["id"] + 1 for entry in document["added_tokens"]))
        if document["added_tokens"]
        else len(vocab)
    )


def checkpoint_of(folder: Path, files: Files) -> Path:
    """doge-tiny with another tokenizer."""
    checkpoint = demo_copy(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    for name, content in files.items():
        if content is not None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (checkpoint / name).write_bytes(data)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return checkpoint


def texts(seed: str, count: int = 200) -> list[str]:
    """Random texts of pieces that are hard, and of every plane of Unicode."""
    draw = random.Random(seed)
    pieces = [
        *(
            "the quick fox",
            "don't",
            "Function",
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "é",
            "e\u0301",
            "漢",
            "字",
            "かな",
            "한",
            "ا",
            "ש",
        ),
        *(
            "😀",
            "👩‍👩‍👧",
            "🏳️‍🌈",
            "🇩🇪",
            "\u200b",
            "\u200d",
            "\ufeff",
            "\u00a0",
            "\u3000",
            "\x00",
            "\x1b",
            "\x7f",
            "\u2581",
        ),
        *(
            "<tool>",
            "<x>",
            "<s>",
            "</s>",
            "<unk>",
            "[MASK]",
            "[CLS]",
            "<|endoftext|>",
            "<pad>",
            "<mask>",
            "<end of it>",
        ),
        *(
            "<extra_id_0>",
            "<|eot_id|>",
            "1,234.56",
            "x = y ** 2  # z",
            "<0x41>",
            "Ġ",
            "##ing",
            "ß",
            "İ",
            "ﬁ",
            "½",
            "\ufffd",
        ),
    ]
    codes = [code for code in range(0, 0x110000, 257) if not 0xD800 <= code < 0xE000]
    made = ["".join(draw.choice(pieces) for _ in range(draw.randrange(1, 12))) for _ in range(count)]
    made += ["".join(chr(draw.choice(codes)) for _ in range(20)) for _ in range(count // 10)]
    return ["", *made, "".join(map(chr, range(256)))]


def compared(family: str, place: Callable[[Files], None], folder: Path) -> Outcome:
    from transformers import AutoTokenizer

    files: Files = {name: json.loads(data) if name.endswith(".json") else data for name, data in saved(family).items()}
    place(files)
    checkpoint = checkpoint_of(folder, files)
    bundle = folder / "bundle"
    bundle.mkdir()
    try:
        write_tokenizer(open_checkpoint(str(checkpoint)), bundle)
        own = Tokenizer.from_directory(bundle)
    except UnsupportedModelError as error:
        line = str(error)
        return refused(line) if str(checkpoint) in line and "\n" not in line else wrong(line)
    reference = AutoTokenizer.from_pretrained(checkpoint)
    for text in texts(family):
        expected = reference(text)["input_ids"]
        if (found := own.ids(text, add_special_tokens=True)) != expected:
            return wrong(f"{text!r}: {found} instead of {expected}")
        decoded = reference.backend_tokenizer.decode(expected, skip_special_tokens=True)
        if (back := own.decode(expected)) != decoded:
            return wrong(f"{text!r} comes back as {back!r} instead of {decoded!r}")
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    return right() if own.render_chat(CHAT) == expected else wrong("another conversation")


def _damaged(name: str, data: bytes | None, folder: Path) -> Outcome:
    """A file of the tokenizer that is broken, or missing."""
    checkpoint = demo_copy(folder)
    if data is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(data)
    bundle = folder / "bundle"
    bundle.mkdir()
    try:
        write_tokenizer(open_checkpoint(str(checkpoint)), bundle)
        Tokenizer.from_directory(bundle).encode("text")
    except UnsupportedModelError as error:
        line = str(error)
        return refused(line) if str(checkpoint) in line and name in line and "\n" not in line else wrong(line)
    except DogeDeployError as error:
        return wrong(f"not noticed at export: {error}")
    return right()


def _surrogate(folder: Path) -> Outcome:
    try:
        Tokenizer.from_directory(demo_copy(folder)).encode("a\udc80b")
    except UsageError as error:
        return refused(str(error))
    return wrong("taken")


def _sentencepiece(name: str, tokenizer_class: str, folder: Path) -> Outcome:
    """A vocabulary of sentencepiece alone: converted where the libraries for it are there, or refused by its name."""
    from transformers.utils import sentencepiece_model_pb2_new as messages

    model = messages.ModelProto()
    for index, (piece, score) in enumerate(json.loads(saved("T5")["tokenizer.json"])["model"]["vocab"]):
        model.pieces.add(piece=piece, score=score, type=2 if piece == "<unk>" else 3 if index < 3 else 1)
    files: Files = {name: model.SerializeToString(), "tokenizer_config.json": {"tokenizer_class": tokenizer_class}}
    checkpoint = checkpoint_of(folder, files)
    bundle = folder / "bundle"
    bundle.mkdir()
    try:
        write_tokenizer(open_checkpoint(str(checkpoint)), bundle)
    except UnsupportedModelError as error:
        line = str(error)
        return refused(line) if name in line and "\n" not in line else wrong(line)
    found = Tokenizer.from_directory(bundle).encode("the function returns")
    return right() if len(found) > 3 else wrong(f"converted to {found}")


DAMAGED: dict[str, tuple[str, bytes | None]] = {
    "no vocabulary": ("tokenizer.json", None),
    "a cut tokenizer.json": ("tokenizer.json", b'{"version": "1.0", '),
    "an empty tokenizer.json": ("tokenizer.json", b""),
    "tokenizer.json is a list": ("tokenizer.json", b"[]"),
    "tokenizer_config.json is a list": ("tokenizer_config.json", b"[]"),
    "a cut tokenizer_config.json": ("tokenizer_config.json", b'{"a'),
    "special_tokens_map.json is no JSON": ("special_tokens_map.json", b"\xff"),
    "added_tokens.json is a list": ("added_tokens.json", b"[1]"),
    "code of its own": ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["x.Slow", "x.Fast"]}}'),
    "a role that is a number": ("tokenizer_config.json", b'{"bos_token": 3}'),
    "a template that is a number": ("tokenizer_config.json", b'{"chat_template": 3}'),
    "a template that is not UTF-8": ("chat_template.jinja", b"\xff"),
    "no tokenizer_config.json": ("tokenizer_config.json", None),
}


def cases() -> list[Case]:
    return [
        *(
            Case(
                f"{family}, {place.__name__}",
                functools.partial(compared, family, place),
                sweep=(row + column) % 4 > 0,  # each family and each place in three of its cases or more
            )
            for row, family in enumerate(FAMILIES)
            for column, place in enumerate(PLACES)
        ),
        *(Case(name, functools.partial(_damaged, *damage)) for name, damage in DAMAGED.items()),
        *(
            Case(f"{name} alone, {kind}", functools.partial(_sentencepiece, name, kind))
            for name in ("tokenizer.model", "spiece.model")
            for kind in ("T5Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast")
        ),
        Case("a surrogate in the text", _surrogate),
    ]
