"""Environments of their own: every supported Python, lint, types.  `nox -l` lists them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests", "lint", "typing"]

CONSTRAINTS = "constraints.txt"
PARALLEL = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
"""As in the Makefile."""


def install(session: nox.Session, extras: str) -> None:
    """Install the package itself with `extras`, at the versions that CI tests."""
    session.install("-c", CONSTRAINTS, "-e", f".[{extras}]")


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The tests that need no special device, without sweeps."""
    install(session, "export,cpu,rtx,plugins,serve,bench,dev")
    session.run("pytest", *PARALLEL, "-m", "not sweep", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """All tests that need no special device."""
    install(session, "export,cpu,rtx,plugins,serve,bench,dev")
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session(name="planted-faults")
def planted_faults(session: nox.Session) -> None:
    """Faults in the sources, one in each package: `make test`'s selection catches each."""
    install(session, "export,cpu,rtx,plugins,serve,bench,dev")
    session.run("python", "tests/planted_faults.py", *session.posargs)


@nox.session
def kernels(session: nox.Session) -> None:
    """The kernels in Triton's interpreter on many drawn shapes and on large ones."""
    install(session, "export,cpu,plugins,dev")
    files = ["tests/kernels", "tests/verify/test_torch_kernels.py"]
    session.run("pytest", *files, *session.posargs, env={"DOGE_KERNEL_SWEEP": "1", "TRITON_INTERPRET": "1"})


@nox.session(name="tensorrt-contract")
def tensorrt_contract(session: nox.Session) -> None:
    """What the plugins say to NVIDIA's own `tensorrt.plugin`, with no GPU; needs a C compiler."""
    install(session, "export,cpu,plugins,dev,rtx")
    # the bindings alone: the package of TensorRT's library is on another index
    session.install("-c", CONSTRAINTS, "--no-deps", "tensorrt-cu13-bindings>=11.4")
    environment = {"DOGE_TENSORRT_CONTRACT": "1", "TRITON_INTERPRET": "1"}
    session.run("pytest", "tests/kernels/test_tensorrt_contract.py", *session.posargs, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Rules and format."""
    session.install("-c", CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Types, strict on the package."""
    install(session, "export,cpu,rtx,plugins,serve,bench,dev")
    session.run("mypy", "doge_deploy")


_interop: dict[str, str] = {}


def interop_bundles(session: nox.Session) -> str:
    """A directory of bundles and of what `doge-deploy generate` makes of them, written once for all sessions."""
    if "bundles" not in _interop:
        if importlib.util.find_spec("doge_deploy") is None:
            session.error("run .venv/bin/nox: the environment of `make setup` exports the bundles")
        _interop["bundles"] = session.create_tmp()
        shutil.rmtree(_interop["bundles"])
        session.run(sys.executable, "tests/interop/prepare.py", _interop["bundles"], external=True)
    return _interop["bundles"]


@nox.session(name="interop-optimum")
def interop_optimum(session: nox.Session) -> None:
    """Bundles in optimum's ORTModelForCausalLM: the same greedy tokens."""
    session.install("-r", "tests/interop/requirements-optimum.txt")
    session.run("python", "tests/interop/optimum_client.py", interop_bundles(session))


@nox.session(name="interop-genai")
def interop_genai(session: nox.Session) -> None:
    """Bundles in onnxruntime-genai: the same greedy tokens."""
    session.install("-r", "tests/interop/requirements-genai.txt")
    session.run("python", "tests/interop/genai_client.py", interop_bundles(session))


@nox.session(name="interop-openvino")
def interop_openvino(session: nox.Session) -> None:
    """Bundles without local functions in OpenVINO: the same greedy tokens."""
    session.install("-r", "tests/interop/requirements-openvino.txt")
    session.run("python", "tests/interop/openvino_client.py", interop_bundles(session))


@nox.session(name="interop-node")
def interop_node(session: nox.Session) -> None:
    """Bundles in onnxruntime-node, from JavaScript: the same greedy tokens.  Needs Node and npm."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            session.error(f"{program} is not on the PATH; install Node 20 or later")
    bundles = interop_bundles(session)
    packages = Path(session.create_tmp(), "node")
    shutil.copytree("tests/interop/node", packages, dirs_exist_ok=True)
    # the install scripts would fetch libraries for CUDA; the CPU provider is in the package
    session.run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(packages), external=True)
    session.run("python", "tests/interop/node_client.py", bundles, str(packages))


@nox.session
def recordings(session: nox.Session) -> None:
    """Bundles judged by recordings where neither torch nor transformers nor onnx is: the wheel and ONNX Runtime alone.

    The environment of `make setup` writes bundles, broken ones and recordings. With -- --large also the 20M size.
    """
    if importlib.util.find_spec("doge_deploy") is None:
        session.error("run .venv/bin/nox: the environment of `make setup` makes the recordings")
    folder = session.create_tmp()
    shutil.rmtree(folder)
    session.run(sys.executable, "tests/recordings/prepare.py", folder, *session.posargs, external=True)
    session.run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ".", external=True)
    (wheel,) = Path(folder).glob("doge_deploy-*.whl")
    session.install("-c", CONSTRAINTS, f"{wheel}[cpu]")
    session.run("python", "tests/recordings/judge.py", folder)


@nox.session
def properties(session: nox.Session) -> None:
    """Random examples of the whole space of configs and calls:  nox -s properties -- --examples 300"""
    install(session, "export,cpu,dev")
    session.run("python", "tests/properties/run.py", *session.posargs)
