"""How fast a graph that ONNX Runtime optimised opens, by the form it is kept in: python session_forms.py BUNDLE...

Medians of fresh processes, in turns, with the peak memory of each after its first token. "Packed weights kept" are
those of `session.save_external_prepacked_constant_initializers`; "originals zeroed" is that file with zeros in the
place of every weight that has a packed form. Where its logits differ from the others', what is
computed follows the originals, whatever is kept beside them, so that they cannot be left out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click
import onnx
import onnxruntime

SCRIPT = """
import re, sys, time
import numpy, onnxruntime
onnxruntime.set_default_logger_severity(3)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
if sys.argv[2] == "unpacked":
    options.add_session_config_entry("session.disable_prepacking", "1")
start = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
taken = 1000 * (time.perf_counter() - start)
feeds = {}
for value in session.get_inputs():
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    fill = {"input_ids": 7, "sequence_lengths": 1}.get(value.name, 0)
    feeds[value.name] = numpy.full(shape, fill, numpy.float32 if "float" in value.type else numpy.int64)
logits = session.run(["logits"], feeds)[0]
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e6
print(taken, peak, float(numpy.abs(logits).sum()))
"""


def save(graph: Path, target: Path, settings: dict[str, str]) -> Path:
    """The graph as ONNX Runtime optimised it, its weights in a file beside it unless the settings say otherwise."""
    target.parent.mkdir()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    for name, value in settings.items():
        options.add_session_config_entry(f"session.{name}", value)
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return target


def zero_originals(graph: Path) -> None:
    """Write zeros over the weights that have a packed form."""
    model = onnx.load(graph, load_external_data=False)
    zeroed = 0
    for tensor in model.graph.initializer:
        places = {entry.key: entry.value for entry in tensor.external_data}
        if any(key.startswith("prepacked") for key in places):
            with (graph.parent / places["location"]).open("r+b") as file:
                file.seek(int(places["offset"]))
                file.write(bytes(int(places["length"])))
            zeroed += 1
    if not zeroed:
        raise click.ClickException(f"{graph}: no weight has a packed form; this ONNX Runtime keeps none")


def forms(graph: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Name: a file, and whether its weights are packed when it is opened."""
    weights = {
        "optimized_model_external_initializers_file_name": "model.weights",
        "optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    plain = save(graph, folder / "plain" / "model.onnx", weights)
    kept = {**weights, "save_external_prepacked_constant_initializers": "1"}
    packed = save(graph, folder / "packed" / "model.onnx", kept)
    shutil.copytree(packed.parent, folder / "zeroed")
    zero_originals(folder / "zeroed" / packed.name)
    return {
        "ONNX, weights beside it": (plain, "packed"),
        "the same, without packing": (plain, "unpacked"),
        "ORT format": (save(graph, folder / "ort" / "model.ort", {"save_model_format": "ORT"}), "packed"),
        "packed weights kept": (packed, "packed"),
        "packed weights kept, originals zeroed": (folder / "zeroed" / packed.name, "packed"),
    }


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--runs", default=9, show_default=True)
def cli(bundles: tuple[Path, ...], runs: int) -> None:
    """Print a table for each bundle."""
    onnxruntime.set_default_logger_severity(3)
    for bundle in bundles:
        with tempfile.TemporaryDirectory() as folder:
            rows = forms(bundle / "model.ort.onnx", Path(folder))
            found: dict[str, list[list[float]]] = {name: [] for name in rows}
            for _ in range(runs):
                for name, (file, packing) in rows.items():
                    command = [sys.executable, "-c", SCRIPT, str(file), packing]
                    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    found[name].append([float(word) for word in printed.split()])
        click.echo(
            f"{bundle}\n\n| | ms | smallest to largest | peak MB | sum of logits |\n| --- | --- | --- | --- | --- |"
        )
        for name, measured in found.items():
            times, peaks, sums = zip(*measured, strict=True)
            spread = f"{min(times):.1f} to {max(times):.1f}"
            click.echo(f"| {name} | {median(times):.1f} | {spread} | {median(peaks):.0f} | {median(sums):.1f} |")
        click.echo()


if __name__ == "__main__":
    cli()
