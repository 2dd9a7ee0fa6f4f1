"""Small tokenizers of every family that checkpoints have, trained here and saved through transformers' own classes."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (
    "The quick brown fox jumps over the lazy dog, and it's not 1,234.56 degrees. A function returns its value; a list "
    "holds items. don't do not he's I'm we've déjà vu naïve über straße 漢字 かな 中文 한국어 مرحبا שלום नमस्ते "
    "😀 👍🏽 👩‍👩‍👧 the the the function function value value list list returns returns"
)
CORPUS = [WORDS, WORDS.lower(), "def f(x):\n    return x ** 2\n", "tabs\tand  blanks\r\n"] * 4


def _bytes_bpe(pre_tokenizer: Any, specials: list[str], size: int = 700) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            show_progress=False, vocab_size=size, special_tokens=specials, initial_alphabet=sorted(alphabet)
        ),
    )
    return made


def _vocabulary(made: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(made.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return model["vocab"], merges


def _fallback_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Of a BPE with tokens for bytes, in the order of Llama 2: control tokens, bytes, merged pieces."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        CORPUS[:2],
        trainers.BpeTrainer(show_progress=False, vocab_size=300, special_tokens=["<unk>"], limit_alphabet=60),
    )
    pieces, merges = _vocabulary(trained)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece for piece in sorted(pieces, key=pieces.__getitem__) if piece not in names]
    return {name: index for index, name in enumerate(names)}, merges


def _unigram_pieces(specials: list[str]) -> list[tuple[str, float]]:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(show_progress=False, vocab_size=300, special_tokens=specials, unk_token="<unk>")
    )
    return [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]


def _fast(made: Tokenizer, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=made, **options)


def byte_level() -> Any:
    return _fast(
        _bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>", "<|pad|>"]),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )


def llama_3() -> Any:
    split = pre_tokenizers.Split(
        Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"),
        "isolated",
    )
    levels = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made = _bytes_bpe(levels, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))]
    )
    return _fast(made, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def llama_2() -> Any:
    from transformers import LlamaTokenizer

    vocab, merges = _fallback_vocabulary()
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def gemma() -> Any:
    from transformers import GemmaTokenizer

    vocab, merges = _fallback_vocabulary()
    names = ["<pad>", "<eos>", "<bos>", *(name for name in vocab if name not in ("<s>", "</s>"))]
    return GemmaTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=merges)


def qwen2() -> Any:
    from transformers import Qwen2Tokenizer

    vocab, merges = _vocabulary(_bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"]))
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


def gpt2() -> Any:
    from transformers import GPT2Tokenizer

    vocab, merges = _vocabulary(_bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"]))
    return GPT2Tokenizer(vocab=vocab, merges=merges)


def roberta() -> Any:
    from transformers import RobertaTokenizer

    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab, merges = _vocabulary(_bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), specials))
    return RobertaTokenizer(vocab=vocab, merges=merges)


def t5() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=_unigram_pieces(["<pad>", "</s>", "<unk>"]), extra_ids=3)


def albert() -> Any:
    from transformers import AlbertTokenizer

    return AlbertTokenizer(vocab=_unigram_pieces(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]))


def xlm_roberta() -> Any:
    from transformers import XLMRobertaTokenizer

    return XLMRobertaTokenizer(vocab=_unigram_pieces(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))


def bert() -> Any:
    from transformers import BertTokenizer

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(show_progress=False, vocab_size=400, special_tokens=specials)
    )
    return BertTokenizer(vocab=made.get_vocab(with_added_tokens=False))


def unigram_bytes() -> Any:
    pieces = [*_unigram_pieces(["<unk>", "<s>", "</s>"]), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_level() -> Any:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(CORPUS, trainers.WordLevelTrainer(show_progress=False, special_tokens=["<unk>", "<s>"]))
    return _fast(made, bos_token="<s>", unk_token="<unk>")


FAMILIES: dict[str, Callable[[], Any]] = {
    "byte-level BPE": byte_level,
    "Llama 3": llama_3,
    "Llama 2": llama_2,
    "Gemma": gemma,
    "Qwen2": qwen2,
    "GPT-2": gpt2,
    "RoBERTa": roberta,
    "T5": t5,
    "ALBERT": albert,
    "XLM-RoBERTa": xlm_roberta,
    "BERT": bert,
    "Unigram with bytes": unigram_bytes,
    "words": word_level,
}


@functools.cache
def saved(family: str) -> dict[str, bytes]:
    """The files that transformers writes for a tokenizer of a family."""
    with tempfile.TemporaryDirectory() as folder:
        FAMILIES[family]().save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}
