"""What pages begin with: bundles that earlier pages made, and things that are wrong on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from page_blocks import PageError

ROOT = Path(__file__).parents[2]

EXPORTS = {
    "build/doge-tiny": ["doge-tiny"],
    "build/doge-tiny-fp16": ["doge-tiny", "--dtype", "fp16"],
    "build/doge-tiny-int8": ["doge-tiny", "--quantize", "int8"],
    "build/doge-tiny-moe": ["doge-tiny-moe"],
}
"""Bundles by name: what `doge-deploy export` is given."""

FILES = {
    "export_configs": ROOT / "export_configs",
    "plugins": ROOT / "plugins",
    "examples": ROOT / "examples",
    "tests": ROOT / "tests",
}
"""Folders of the repository, for commands that are typed in a clone."""


def checkpoint(target: Path) -> None:
    """The bundled checkpoint as a directory of its own."""
    shutil.copytree(ROOT / "doge_deploy" / "demo" / "doge-tiny", target)


def broken(target: Path) -> None:
    """Checkpoints with one thing wrong each."""
    _import_tests()
    from broken_checkpoints import BROKEN, make_bases, make_broken

    bases = make_bases(target / "sound")
    for name in BROKEN:
        make_broken(name, bases, target / name)


def beyond(target: Path) -> None:
    """A checkpoint whose tokenizer knows a token that its embedding has no row for."""
    from tokenizers import Tokenizer

    checkpoint(target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(target / "tokenizer.json"))


def wrong(target: Path) -> None:
    """`build/doge-tiny` with one number of one weight changed by 1 %, and its manifest made to fit."""
    _import_tests()
    from bundles import broken_copy, edit_tensor, make_bundle

    def edit(path: Path) -> None:
        edit_tensor(path, "model.layers.1.self_attn.k_proj.weight.T", lambda tensor: tensor[13, 10:11].mul_(1.01))

    with tempfile.TemporaryDirectory() as folder:
        broken_copy(make_bundle("doge-tiny", Path(folder, "sound")), target, weights=edit)


def toy(target: Path) -> None:
    """The entry point of docs/extend-backend.md, as pip would install it; the page itself has the module."""
    information = target / "toy-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[doge_deploy.backends]\ntoy = toy_backend:BACKEND\n")


MADE: dict[str, Callable[[Path], None]] = {
    "checkpoint": checkpoint,
    "beyond": beyond,
    "broken": broken,
    "build/wrong": wrong,
    "installed/toy": toy,
}
"""Everything else, by name."""

_made: dict[str, Path] = {}


def put(name: str, folder: Path, bin_folder: Path, have: dict[str, Path]) -> None:
    """Put what is called `name` into the folder of a page.

    Raises:
        PageError: nothing is called so.
    """
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if name in FILES:
        target.symlink_to(FILES[name])
        return
    source = have.get(name)
    shutil.copytree(source or make(name, bin_folder), target, symlinks=True)


def make(name: str, bin_folder: Path) -> Path:
    """Make what is called `name`, once, and say where it is.

    Raises:
        PageError: nothing is called so.
    """
    if name not in _made:
        path = Path(tempfile.mkdtemp(prefix="page-"), "made")
        if name in EXPORTS:
            command = [str(bin_folder / "doge-deploy"), "export", *EXPORTS[name], "-o", str(path)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        elif name in MADE:
            MADE[name](path)
        else:
            known = sorted([*FILES, *EXPORTS, *MADE])
            raise PageError(f"begins with {name}: not known; known: {', '.join(known)}")
        _made[name] = path
    return _made[name]


def forget() -> None:
    """Remove what was made."""
    for path in _made.values():
        shutil.rmtree(path.parent, ignore_errors=True)
    _made.clear()


def _import_tests() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
