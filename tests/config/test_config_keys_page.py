"""The page of all config keys is what its tests say."""

from __future__ import annotations

from config_keys_page import EXACT, PAGE, page

from doge_deploy.config import keys as config_keys


def test_the_page_is_not_stale() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/config_keys_page.py"


def test_every_key_that_is_read_has_a_row() -> None:
    assert EXACT.keys() >= config_keys.USED_KEYS
    assert EXACT.keys() <= config_keys.KNOWN_KEYS
