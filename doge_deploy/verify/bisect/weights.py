"""Which tensor of two weight files makes two bundles differ."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from doge_deploy.bundle.files import WEIGHTS_FILE
from doge_deploy.checkpoint.headers import TensorInfo
from doge_deploy.graph.weight_file import read_weight_file

_PIECE = 1 << 20


def differing_tensors(good: Path, bad: Path) -> list[str]:
    """Tensors of two bundles whose bytes, dtype or shape differ, or that one lacks, in the order of the file."""
    one, two = read_weight_file(good), read_weight_file(bad)
    names = sorted({*one, *two}, key=lambda name: (one.get(name) or two[name]).offset)
    return [name for name in names if name not in one or name not in two or not _equal(one[name], two[name])]


def _equal(one: TensorInfo, two: TensorInfo) -> bool:
    if (one.dtype, one.shape, one.nbytes) != (two.dtype, two.shape, two.nbytes):
        return False
    with one.file.open("rb") as first, two.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(two.offset)
        left = one.nbytes
        while left:
            size = min(left, _PIECE)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def first_culprit(
    good: Path, bad: Path, names: Sequence[str], scratch: Path, differs: Callable[[Path], bool]
) -> str | None:
    """The first tensor that makes a difference, found by halving.

    Args:
        good, bad: bundles whose weight files hold all of `names` in the same form.
        names: tensors that differ.
        scratch: an empty directory with room for one weight file.
        differs: whether the numbers with the weight file of a directory are others than those with the good one.

    Returns:
        The first name such that the good file with BAD's tensors up to it computes something else; None where even all
        of them make no difference.
    """
    infos, others = read_weight_file(good), read_weight_file(bad)
    target = scratch / WEIGHTS_FILE

    def with_first(count: int) -> bool:
        shutil.copyfile(good / WEIGHTS_FILE, target)
        with target.open("r+b") as file:
            for name in names[:count]:
                file.seek(infos[name].offset)
                with others[name].file.open("rb") as source:
                    source.seek(others[name].offset)
                    file.write(source.read(others[name].nbytes))
        return differs(scratch)

    if not with_first(len(names)):
        return None
    low, high = 0, len(names)  # `low` make none, `high` make one
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if with_first(middle) else (middle, high)
    return names[low]
