"""Where the time to open a bundle goes, beside llama.cpp's: python load_parts.py BUNDLE...

Medians of fresh processes, in turns; libraries are imported before the clock starts. ONNX Runtime opens the graph that
it optimised before. "Without packing" is the least that it takes: nothing is optimised, and no weight is packed for its
kernels. "In turns" each part begins when the one before has ended; otherwise as programs open a bundle: files are
hashed, and the tokenizer is read, while the session is made. llama.cpp opens a random Llama of the bundle's shape,
without a vocabulary and with one of as many tokens and merges as the bundle's tokenizer has, since its file holds both;
ours is a file of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click

from doge_deploy.bench.baselines.llama_gguf import TYPES, write_gguf
from doge_deploy.bench.candidates import weights_of
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.text.files import TOKENIZER_FILE

OURS = """
import sys, time
from pathlib import Path
import numpy, onnxruntime
import doge_deploy.runtime.ort
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.backend import open_backend
from doge_deploy.runtime.ort import graph_cache
from doge_deploy.runtime.text_model import TextModel
path = Path(sys.argv[1])

def session(packed):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    (graph,) = graph_cache.cache_folder().glob("*/model.onnx")
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

def runner(in_turns):
    return open_backend(open_bundle(path, check="quick", wait=in_turns), threads=2, flush_denormals=True)

def text(in_turns):
    model = TextModel(path, threads=2, flush_denormals=True, at_once=not in_turns)
    model.open()
    return model

start = time.perf_counter()
kept = [PART]
print(1000 * (time.perf_counter() - start))
"""

PARTS = {
    "ours: manifest and hashes": 'open_bundle(path, check="quick")',
    "ours: session without packing": "session(False)",
    "ours: session": "session(True)",
    "ours: runner, in turns": "runner(True)",
    "ours: runner": "runner(False)",
    "ours: runner and tokenizer, in turns": "text(True)",
    "ours: runner and tokenizer": "text(False)",
}

THEIRS = """
import sys, time
import llama_cpp
quiet = llama_cpp.llama_log_callback(lambda *message: None)
llama_cpp.llama_log_set(quiet, None)
llama_cpp.llama_backend_init()
start = time.perf_counter()
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
context = llama_cpp.llama_init_from_model(model, llama_cpp.llama_context_default_params())
assert model and context
print(1000 * (time.perf_counter() - start))
"""


def milliseconds(script: str, path: Path, cache: str) -> float:
    """What a fresh process prints."""
    environment = {**os.environ, "DOGE_DEPLOY_GRAPH_CACHE": cache}
    command = [sys.executable, "-c", script, str(path)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def scripts(bundle: Path, folder: Path) -> dict[str, tuple[str, Path]]:
    """Name: a script, and the path that it is given."""
    found = {name: (OURS.replace("PART", part), bundle) for name, part in PARTS.items()}
    if not (bundle / TOKENIZER_FILE).is_file():
        found = {name: row for name, row in found.items() if "tokenizer" not in name}
    if not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))):
        click.echo("llama.cpp is left out: pip install 'doge-deploy[llama]'", err=True)
        return found
    opened = open_bundle(bundle)
    kind = TYPES[weights_of(opened)]
    for name, tokenizer in (("no vocabulary", None), ("a vocabulary", bundle / TOKENIZER_FILE)):
        if tokenizer is None or tokenizer.is_file():
            file = folder / f"{name}.gguf"
            write_gguf(file, opened.manifest.facts, kind, tokenizer)
            found[f"llama.cpp {kind}, {name}"] = (THEIRS, file)
    return found


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--runs", default=9, show_default=True)
def cli(bundles: tuple[Path, ...], runs: int) -> None:
    """Print a table for each bundle."""
    for bundle in bundles:
        with tempfile.TemporaryDirectory() as folder:
            cache = str(Path(folder, "cache"))
            rows = scripts(bundle, Path(folder))
            milliseconds(*rows["ours: runner"], cache)  # writes the optimised graph
            found: dict[str, list[float]] = {name: [] for name in rows}
            for _ in range(runs):
                for name, (script, path) in rows.items():
                    found[name].append(milliseconds(script, path, cache))
        click.echo(f"{bundle}\n\n| | ms | smallest to largest |\n| --- | --- | --- |")
        for name, times in found.items():
            click.echo(f"| {name} | {median(times):.1f} | {min(times):.1f} to {max(times):.1f} |")
        click.echo()


if __name__ == "__main__":
    cli()
