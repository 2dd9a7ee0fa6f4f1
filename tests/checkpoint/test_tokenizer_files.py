"""What of a checkpoint's tokenizer a bundle gets; tests/hard_inputs compares every family with AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hard_inputs import kind_01_tokenizers as tokenizers
from hard_inputs.frame import DEMO, demo_copy

from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint import tokenizer as module
from doge_deploy.checkpoint.tokenizer import write_tokenizer
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.text.tokenizer import Tokenizer


def written(checkpoint: Path, folder: Path) -> tuple[Path, tuple[str, ...]]:
    bundle = folder / "bundle"
    bundle.mkdir()
    return bundle, write_tokenizer(open_checkpoint(str(checkpoint)), bundle)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_that_say_it_all_are_taken_as_they_are(tmp_path: Path) -> None:
    bundle, warnings = written(DEMO, tmp_path)
    assert warnings == ()
    assert names(bundle) == sorted(path.name for path in DEMO.iterdir() if path.suffix != ".safetensors")
    assert all((bundle / name).read_bytes() == (DEMO / name).read_bytes() for name in names(bundle))


def test_one_file_is_written_where_they_do_not(tmp_path: Path) -> None:
    checkpoint = demo_copy(tmp_path, added_tokens=lambda document: {"<tool>": 1024})
    bundle, warnings = written(checkpoint, tmp_path)
    assert "added_tokens.json" not in names(bundle) and "'<tool>' (1024)" in warnings[0]
    added = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert "<tool>" in {token["content"] for token in added}
    # the bundle is read by transformers as the checkpoint is
    from transformers import AutoTokenizer

    texts = tokenizers.texts("bundle", 50)
    reference, own = AutoTokenizer.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(bundle)
    assert [own(text)["input_ids"] for text in texts] == [reference(text)["input_ids"] for text in texts]
    assert own.special_tokens_map == reference.special_tokens_map and own.chat_template == reference.chat_template


def test_a_checkpoint_without_a_tokenizer_is_taken(tmp_path: Path) -> None:
    checkpoint = demo_copy(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (checkpoint / name).unlink()
    bundle, warnings = written(checkpoint, tmp_path)
    assert names(bundle) == ["config.json", "generation_config.json"] and warnings == ()


@pytest.mark.parametrize("text", ["<|eot_id|>", "漢字", " leading and trailing ", "\ufffd"])
def test_a_difference_that_tokenizer_json_cannot_say_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    """A reference that gives other ids for some texts, as a class with code of its own would."""
    load = module._load

    def altered(checkpoint: Path) -> Any:
        reference = load(checkpoint)
        kind = type(reference)

        class Other(kind):  # type: ignore[misc, valid-type]
            def __call__(self, given: str, **options: Any) -> Any:
                encoded = super().__call__(given, **options)
                return {"input_ids": [*encoded["input_ids"], 7]} if text in given else encoded

        reference.__class__ = Other
        return reference

    monkeypatch.setattr(module, "_load", altered)
    with pytest.raises(UnsupportedModelError, match=r"gives what tokenizer\.json cannot say: ") as error:
        written(demo_copy(tmp_path), tmp_path)
    assert "\n" not in str(error.value) and "instead of [7]" in str(error.value)


def test_a_template_that_does_not_end_is_a_warning(tmp_path: Path) -> None:
    checkpoint = demo_copy(tmp_path)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(loop, encoding="utf-8")
    bundle, warnings = written(checkpoint, tmp_path)
    assert len(warnings) == 1 and warnings[0].startswith("the chat template was stopped: it takes more than ")
    assert Tokenizer.from_directory(bundle).encode("text")


def test_templates_without_a_default(tmp_path: Path) -> None:
    checkpoint = demo_copy(
        tmp_path,
        tokenizer_config=lambda config: config.update(chat_template=[{"name": "tool_use", "template": "x"}]),
    )
    (checkpoint / "chat_template.jinja").unlink()
    bundle, warnings = written(checkpoint, tmp_path)
    assert warnings == (
        "no chat template is named 'default' (tool_use): without tools transformers takes none of them",
    )
    assert Tokenizer.from_directory(bundle).chat_template is None
