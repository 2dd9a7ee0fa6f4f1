"""schemathesis over `/openapi.json` of a running server: legal and illegal requests, and no 5xx.

    .venv/bin/nox -s serve-fuzz                          # some hundred requests, as CI does
    .venv/bin/nox -s serve-fuzz -- --requests 5000

The server runs in the project's environment, with a bundle that gives all logits and one for embeddings, schemathesis
in one of its own. Each answer must have the documented status, content type and shape; an illegal body must not be
accepted; a stream must be whole. Of each operation's legal bodies a part at least must be accepted, or nothing was
tested.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "load"))

from processes import export_bundles, serving  # noqa: E402

ACCEPTED = 0.3
"""Of the legal bodies of each operation that takes one, this part at least."""
OPERATIONS = 9
ROUNDS = 4


def judge(counts: Mapping[str, int], wanted: int) -> list[str]:
    """Print what came back; what is wrong with it."""
    by_operation: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for key, number in counts.items():
        method, path, mode, status = key.split(" ")
        by_operation[f"{method} {path}", mode][status] += number
    wrong = []
    for (operation, mode), found in sorted(by_operation.items()):
        print(f"{operation} {mode}: {', '.join(f'{status} x {number}' for status, number in sorted(found.items()))}")
        if mode == "positive" and operation.startswith("POST") and found["200"] < ACCEPTED * found.total():
            wrong.append(f"{operation}: only {found['200']} of {found.total()} legal bodies were accepted")
    total = sum(counts.values())
    errors = sum(number for key, number in counts.items() if key.split(" ")[3].startswith("5"))
    print(f"{total} requests, {errors} of them answered with 5xx")
    if errors:
        wrong.append(f"{errors} answers were 5xx")
    if total < wanted:
        wrong.append(f"only {total} requests were sent; {wanted} were wanted")
    return wrong


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schemathesis", default="schemathesis", help="its command")
    parser.add_argument("--requests", type=int, default=600, help="at least so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bundles", type=Path, help="where bundles are or go; a temporary folder where not given")
    options = parser.parse_args()
    bundles = export_bundles(options.bundles or Path(tempfile.mkdtemp()), ("all", "features"))
    names = ("--served-model-name", "text", "--served-model-name", "features")
    # the phase of single deviations from the schema sends some hundred requests whatever is asked for
    examples = max(options.requests // OPERATIONS, 10)
    with tempfile.TemporaryDirectory() as folder, serving([*bundles.values()], "--slots", "4", *names) as server:
        file = Path(folder, "counts.json")
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HERE / "hooks.py"), "DOGE_FUZZ_COUNTS": str(file)}
        counts: collections.Counter[str] = collections.Counter()
        failed = 0
        for seed in range(options.seed, options.seed + ROUNDS):  # it sends no request twice, so one round may end early
            command = [
                *(options.schemathesis, "--config-file", str(HERE / "schemathesis.toml"), "run"),
                *(f"{server.url}/openapi.json", "--mode", "all", "--phases", "examples,coverage,fuzzing"),
                *("--max-examples", str(examples), "--seed", str(seed), "--generation-database", "none"),
                *("--suppress-health-check", "all", "--request-timeout", "60", "--warnings", "off", "--no-color"),
                *("--continue-on-failure",),
            ]
            failed |= subprocess.run(command, cwd=folder, env=environment).returncode
            counts.update(json.loads(file.read_text()))
            if failed or counts.total() >= options.requests:
                break
        wrong = judge(counts, options.requests)
        if server.process.poll() is not None:
            wrong.append(f"the server ended: {server.log.read_text()[-2000:]}")
    for line in wrong:
        print(line)
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
