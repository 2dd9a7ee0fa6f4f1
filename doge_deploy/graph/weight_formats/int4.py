"""4 bits, block by block."""

from __future__ import annotations

from doge_deploy.graph.weight_formats._base import Quality
from doge_deploy.graph.weight_formats._blocks import BlockFormat


class Format(BlockFormat):
    """Weights in 4 bits. With so few levels it pays to clip the outermost number of a block."""

    name = "int4"
    title = "4 bits, block by block"
    bits = 4
    shrink = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
    default_block_size = 32
    quality = Quality(
        0.3,
        1.3,
        0.85,
        "doge-tiny loses 0.08 to 0.14 nats at block sizes 16 to 64. Halves of bytes exchanged lose more than 1 nat "
        "(tests/verify/test_quality.py).",
    )
