"""Text from real bundles, where neither torch nor transformers can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DogeForCausalLM, PreTrainedTokenizerFast

from doge_deploy.cli.main import run_command

DEMO = Path(__file__).parents[2] / "doge_deploy" / "demo"

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnxscript"):
    sys.modules[name] = None  # importing it raises ImportError
from doge_deploy.cli.main import main
main(sys.argv[1:])
"""


def generate(bundle: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", WITHOUT_TORCH, "generate", str(bundle), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "tok/s" in result.stderr
    return result.stdout


def reference(name: str, prompt: str, count: int) -> str:
    """transformers' greedy text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO / name)
    model = DogeForCausalLM.from_pretrained(DEMO / name, attn_implementation="eager")
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("layout", ["static", "growing"])
@pytest.mark.parametrize("prompt", ['The "for" statement', "A list"])
def test_greedy_text_is_that_of_transformers(tiny_bundle: Path, layout: str, prompt: str) -> None:
    # 40 tokens: below the window of 64, where transformers' text does not depend on its choice among ties
    torch.set_num_threads(1)
    text = generate(tiny_bundle, "--prompt", prompt, "--greedy", "--max-new-tokens", "40", "--layout", layout)
    assert text.rstrip("\n") == reference("doge-tiny", prompt, 40).rstrip("\n")


def test_mixture_of_experts_and_chat(tiny_moe_bundle: Path) -> None:
    text = generate(tiny_moe_bundle, "--chat", "--prompt", "What is 'lambda' in Python?", "--greedy")
    assert "lambda" in text


def test_the_same_seed_draws_the_same_text(tiny_bundle: Path) -> None:
    arguments = ["--prompt", "A list", "--seed", "7", "--max-new-tokens", "20"]
    assert generate(tiny_bundle, *arguments) == generate(tiny_bundle, *arguments)


def test_a_prompt_that_does_not_fit_is_one_line(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["generate", str(tiny_bundle), "--prompt", "word " * 600]) == 2
    error = capfd.readouterr().err
    assert "512" in error
    assert error.count("\n") == 1


IMPORTS_NUMPY = """
import os, sys
from importlib.abc import MetaPathFinder

class Watch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            print(os.environ.get("OPENBLAS_NUM_THREADS"), file=sys.stderr)

sys.meta_path.insert(0, Watch())
from doge_deploy.cli.main import run_command
before = os.environ.get("OPENBLAS_NUM_THREADS")
assert run_command(["generate", sys.argv[1], "--prompt", "The", "--max-new-tokens", "1", "--quiet"]) == 0
assert os.environ.get("OPENBLAS_NUM_THREADS") == before
"""


@pytest.mark.parametrize(("given", "read"), [(None, "1"), ("3", "3")], ids=["by default", "as the user says"])
def test_numpy_starts_no_threads_of_its_own(tiny_bundle: Path, given: str | None, read: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    if given is not None:
        environment["OPENBLAS_NUM_THREADS"] = given
    command = [sys.executable, "-c", IMPORTS_NUMPY, str(tiny_bundle)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, f"{read}\n")
