"""`bench` of doge-tiny against the real libraries: they compute the same, and every figure is there.

python against_real.py genai openvino llama.cpp compile
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from doge_deploy.api import export
from doge_deploy.bench.report import compared, equal_tokens, ratios, same_model
from doge_deploy.bench.run import BenchOptions, bench


def main(rivals: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundles = []
        for quantize in (None, "int8"):
            path = Path(folder, quantize or "fp32")
            export("doge-tiny", path, quantize=quantize)
            bundles.append(path)
        options = BenchOptions(
            (16,), decode_steps=4, rounds=2, loads=1, batch_sizes=(1, 2), against=tuple(rivals), cache=Path(folder)
        )
        report = bench(bundles, options)
    assert not report.left_out, report.left_out
    kinds = {candidate.name: candidate.kind for candidate in report.candidates}
    seen: dict[str, int] = dict.fromkeys(rivals, 0)
    for result in report.results:
        for own, other in compared(report):
            mine, theirs = result.of(own), result.of(other)
            if kinds[other] not in seen:
                continue
            if theirs.not_measured:
                assert kinds[other] == "genai" and result.workload.batch_size > 1, theirs.not_measured
                continue
            assert {"decode", "prefill", "load", "peak memory"} <= ratios(mine, theirs).keys()
            if same_model(report, other):
                same, of = equal_tokens(mine, theirs)
                quantized = own == "int8"  # activations are rounded to 8 bits in one of them
                assert same == of or (quantized and same >= of // 2), (own, other, same, of)
            seen[kinds[other]] += 1
    assert all(seen.values()), seen
    print("; ".join(f"{name}: {count} comparisons" for name, count in seen.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
