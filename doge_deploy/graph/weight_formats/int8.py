"""8 bits, block by block."""

from __future__ import annotations

from doge_deploy.graph.weight_formats._base import Quality
from doge_deploy.graph.weight_formats._blocks import BlockFormat


class Format(BlockFormat):
    """Weights in 8 bits. A smaller block costs time and gains nothing that can be seen (docs/decisions/0028)."""

    name = "int8"
    title = "8 bits, block by block"
    bits = 8
    default_block_size = 128
    quality = Quality(
        0.01,
        1.03,
        0.97,
        "doge-tiny, which has little redundancy to absorb rounding, loses 0.001 to 0.003 nats and 0.6 % of perplexity "
        "at block size 32; a single projection whose scales are 10 % too large loses more than the limit "
        "(tests/verify/test_quality.py).",
    )
