"""Servers for the checks of the page: addresses as one line of JSON, until standard input ends. Needs tests/ and
tests/serve in PYTHONPATH.

`real` is doge-tiny, `slow` takes its time and says always the same; `keys` is the same behind a key.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bundles import make_bundle
from servers import NAME, SlowSlots, of_bundle, running, scripted

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.serve.http.app import Served
from doge_deploy.text.tokenizer import Tokenizer

SAID = 'Said <img src=x onerror="document.title=1"> '
"""What the slow server says over and over: a page that takes it for HTML changes its title."""


def saying(bundle: Path) -> Served:
    manifest = open_bundle(bundle).manifest
    ids = Tokenizer.from_directory(bundle).ids(SAID, add_special_tokens=False)
    slots = SlowSlots(
        2,
        rule=lambda history: ids[len(history) % len(ids)],
        vocab=manifest.facts.vocab_size,
        max_length=manifest.max_length,
        seconds=0.06,
    )
    served = scripted(bundle, slots)
    # texts last for half a minute, so that a slow browser finds them running
    served.texts[NAME]._config = {**served.texts[NAME]._config, "max_new_tokens": 500}
    report = {"verdict": "computes what <b>the reference</b> computes", "recording": "a recording"}
    served.verified = {NAME: {**report, "cases": [{"case": "prefill", "layout": "static", "load": 0.25}]}}
    return served


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle("doge-tiny", Path(folder) / "bundle")
        with (
            running(of_bundle(bundle, slots=4)) as real,
            running(saying(bundle)) as slow,
            running(saying(bundle), api_keys=(b"right",)) as keys,
        ):
            print(json.dumps({"real": real.url, "slow": slow.url, "keys": keys.url}), flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()
