# `make test` and `make demo` do all set-up themselves; see README.md.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# a worker a core, each computing with one thread; one that is done takes tests over from another
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup test test-full test-gpu gpu-check demo docs lint typing format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

setup: $(STAMP) ## create .venv and install everything under constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "$$($(PYTHON) --version) found: needs Python 3.11 to 3.13; name one with make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,cpu,rtx,plugins,serve,bench,dev]'
	@touch $@

test: setup lint typing ## lint, type check and the tests that need no special device, without sweeps
	$(BIN)/python -m pytest $(PARALLEL) -m 'not sweep'

test-full: setup lint typing ## the same with all sweeps
	$(BIN)/python -m pytest $(PARALLEL)

test-gpu: setup ## the tests that need a CUDA device or TensorRT
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m 'gpu or tensorrt'
	$(BIN)/nox -s on-gpu

GPU_CHECK := build/gpu-check
GPU_ARCH  ?= sm_90
gpu-check: setup ## one folder that checks the kernels on a machine with a GPU and no network: GPU_ARCH=sm_90
	rm -rf $(GPU_CHECK) && mkdir -p $(GPU_CHECK)
	TRITON_INTERPRET=1 $(BIN)/doge-deploy plugins record --arch $(GPU_ARCH) -o $(GPU_CHECK)/kernels.recording
	$(BIN)/python examples/09_gpu_check/prepare.py $(GPU_CHECK)

demo: setup ## export both demo models, verify them, generate text, serve one
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/00_demo/demo.sh

docs: setup ## the pages of docs/ as a site in build/site, built strictly
	$(BIN)/nox -s docs

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads a package under its own name, and plugins/ installs as doge_plugins
typing: setup ## mypy, strict on the package and the plugins
	mkdir -p build/typing && ln -sfn ../../plugins build/typing/doge_plugins
	MYPYPATH=build/typing $(BIN)/mypy -p doge_deploy -p doge_plugins

format: setup ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .nox
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
