"""Hashes of the tensors of a bundle's weight file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from doge_deploy.graph.weight_file import read_weight_file

_CHUNK = 1 << 20


def hash_weights(bundle: Path) -> dict[str, str]:
    """Per tensor of the weight file sha256 of its type, shape and bytes, in the order of the names.

    Raises:
        BrokenBundleError: there is no whole weight file.
    """
    infos, found = read_weight_file(bundle), {}
    for name in sorted(infos):
        info = infos[name]
        digest = hashlib.sha256(f"{info.dtype} {'x'.join(map(str, info.shape))}\n".encode())
        with info.file.open("rb") as file:
            file.seek(info.offset)
            left = info.nbytes
            while left > 0 and (data := file.read(min(left, _CHUNK))):
                digest.update(data)
                left -= len(data)
        found[name] = digest.hexdigest()
    return found
