"""Which of a tokenizer's files says what: roles of special tokens, settings, the chat template.

Reference: `PreTrainedTokenizerBase._from_pretrained` of transformers/tokenization_utils_base.py, whose order of
precedence this is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doge_deploy.errors import BrokenBundleError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Roles of special tokens that every tokenizer may have."""


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, and over it special_tokens_map.json where that is looked at; empty where there is none.

    Raises:
        BrokenBundleError: a file is not a JSON object.
    """
    config = _read_object(directory / CONFIG_FILE)
    # Checkpoints that write down their added tokens in the config had the map from it: it says nothing new.
    if "added_tokens_decoder" not in config:
        config |= _read_object(directory / SPECIAL_TOKENS_FILE)
    return config


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens by their role: `bos_token` and such, and what a checkpoint adds of its own."""
    own = {key for key in config if key.endswith("_token") and key not in ROLES}
    named = {key: config.get(key) for key in (*ROLES, *sorted(own))}
    for key in ("model_specific_special_tokens", "extra_special_tokens"):
        extra = config.get(key)
        if isinstance(extra, Mapping):
            named |= extra
    return {key: text for key, value in named.items() if (text := _token_text(value)) is not None}


def read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: the file goes before the key; of several templates "default" counts.

    Raises:
        BrokenBundleError: it is not a text.
    """
    file = directory / TEMPLATE_FILE
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
        raise BrokenBundleError(f"{directory / CONFIG_FILE}: chat_template is not a text")
    return template


def _token_text(value: object) -> str | None:
    """A special token is written as a text or as the fields of an AddedToken."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenBundleError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BrokenBundleError(f"{file} holds a {type(config).__name__}; a JSON object is needed")
    return config
