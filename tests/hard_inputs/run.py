"""Try every hard input and print a table: kind, inputs tried, right, refused with a line, wrong.

    python tests/hard_inputs/run.py [--verbose] [WORD...]

With words only the kinds whose names hold one of them. The exit code is 1 where anything is wrong.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hard_inputs.frame import kinds, try_case


def main(arguments: list[str]) -> int:
    verbose = "--verbose" in arguments
    words = [argument for argument in arguments if argument != "--verbose"]
    totals: Counter[str] = Counter()
    print(f"{'kind':44} {'tried':>6} {'right':>6} {'refused':>8} {'wrong':>6}")
    findings = []
    for module in kinds():
        if words and not any(word in module.KIND for word in words):
            continue
        counts: Counter[str] = Counter()
        for number, case in enumerate(module.cases()):
            with tempfile.TemporaryDirectory() as folder:
                outcome = try_case(case, Path(folder) / str(number))
            counts.update([outcome.verdict, "tried"])
            if verbose or outcome.verdict == "wrong":
                findings.append(f"{module.KIND}, {case.name}: {outcome.verdict} {outcome.says}".rstrip())
        totals.update(counts)
        print(_row(module.KIND, counts), flush=True)
    print(_row("all", totals))
    print("\n".join(findings))
    return 1 if totals["wrong"] or not totals["tried"] else 0


def _row(name: str, counts: Counter[str]) -> str:
    return f"{name:44} {counts['tried']:6} {counts['right']:6} {counts['refused']:8} {counts['wrong']:6}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
