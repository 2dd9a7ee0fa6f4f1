"""Export bundles and write down what `doge-deploy generate` makes of them, for clients that have no such command.

    python tests/interop/prepare.py OUT

Writes OUT/<case>, bundles, and OUT/expected.json:
`{"<case>": {"file": "model.onnx", "lowered": "model.ort.onnx" or null, "quantized": whether weights are, "inlined":
whether it has no local functions, "prompts": [[ids], ...], "tokens": [[64 ids], ...], "text": ... or null}}`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.options.generation import GenerationOptions
from doge_deploy.runtime.generate import generate
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.sampling import Sampler
from doge_deploy.runtime.tokenizer import Tokenizer

TOKENS = 64
LEGACY = Path(__file__).parents[1] / "golden" / "legacy" / "dense"
TEXT = "What is a list?"

CASES: dict[str, tuple[str, tuple[str, ...], int]] = {
    # model, options of export, rows of the batch; with rows of different length all logits are needed by genai
    "dense": ("doge-tiny", ("--logits", "all"), 2),
    "dense-last-logits": ("doge-tiny", (), 1),
    "dense-int8": ("doge-tiny", ("--quantize", "int8", "--logits", "all"), 2),
    "dense-int4": ("doge-tiny", ("--quantize", "int4"), 1),
    "dense-fp16": ("doge-tiny", ("--dtype", "fp16"), 1),
    "both-layouts": ("doge-tiny", ("--kv-cache", "static"), 1),
    "moe": ("doge-tiny-moe", (), 1),
    "moe-per-token": ("doge-tiny-moe", ("--routing", "per-token", "--logits", "all"), 2),
    "legacy": (str(LEGACY), (), 1),
    "inlined": ("doge-tiny", ("--inline-functions",), 1),
    "moe-inlined": ("doge-tiny-moe", ("--inline-functions", "--routing", "per-token", "--logits", "all"), 2),
}


def command(*arguments: str) -> str:
    """Run `doge-deploy`; returns its standard output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = run_command(list(arguments))
    if code:
        raise SystemExit(f"doge-deploy {' '.join(arguments)}: exit code {code}")
    return output.getvalue()


def expected(bundle_path: Path, rows: int) -> dict[str, Any]:
    """Prompts whose greedy continuation does not end before `TOKENS` tokens, and those tokens."""
    bundle = open_bundle(bundle_path)
    facts = bundle.manifest.facts
    runner = open_runner(bundle, "growing", threads=1)
    config = bundle.read_json("generation_config.json")
    options = GenerationOptions.merged({"eos_token_id": list(facts.eos_token_ids)}, config, {"do_sample": False})
    prompts: list[list[int]] = []
    tokens: list[list[int]] = []
    text = None
    if (bundle_path / "tokenizer.json").exists():
        prompts.append(Tokenizer.from_directory(bundle_path).encode(TEXT))
    written = list(prompts)
    draw = np.random.default_rng(0)
    while len(tokens) < rows:
        if len(prompts) == len(tokens):
            length = 8 - 3 * len(tokens)  # a shorter second row
            prompts.append([int(i) for i in draw.choice(np.arange(3, facts.vocab_size), length, replace=False)])
        made = list(
            generate(runner, prompts[-1], Sampler(options.sampling), max_new_tokens=TOKENS, eos_ids=options.eos_ids)
        )
        if len(made) == TOKENS and made[-1] not in options.eos_ids:
            tokens.append(made)
        else:
            del prompts[-1]
    if prompts[:1] == written[:1]:
        text = command_text(bundle_path)
        assert text == decoded(bundle_path, tokens[0]), "the command prints other tokens"
    layout = bundle.layout("growing")
    return {
        "file": layout.file,
        "lowered": layout.lowered["ort"].file,
        "quantized": bundle.manifest.options.quantize is not None,
        "inlined": bundle.manifest.options.inline_functions,
        "prompts": prompts,
        "tokens": tokens,
        "text": text,
    }


def command_text(bundle: Path) -> str:
    arguments = ["--prompt", TEXT, "--greedy", "--max-new-tokens", str(TOKENS), "--layout", "growing", "--quiet"]
    return command("generate", str(bundle), *arguments).removesuffix("\n")


def decoded(bundle: Path, tokens: list[int]) -> str:
    detokenizer = Tokenizer.from_directory(bundle).detokenizer()
    return "".join(detokenizer.push(token) for token in tokens) + detokenizer.flush()


def main(out: Path) -> None:
    document = {}
    for name, (model, options, rows) in CASES.items():
        command("export", model, "-o", str(out / name), "--kv-cache", "growing", *options)
        document[name] = expected(out / name, rows)
        print(f"{name}: {rows} x {TOKENS} tokens", flush=True)
    (out / "expected.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
