# Introvert. `make help` lists the targets; each sets up what it needs in .venv by itself.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
# Nothing here runs without bytecode, though the machine asked for it: vLLM, PyTorch and Ray would be compiled anew by each
# process that imports them, which takes longer than the imports themselves.
unexport PYTHONDONTWRITEBYTECODE
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The build that is installed, unless another is asked for; cpu at first.
EXTRA ?= $(or $(patsubst $(VENV)/.runtime-%,%,$(firstword $(wildcard $(VENV)/.runtime-*))),cpu)
LOCKS := deploy/locks
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install --no-deps --no-compile --progress-bar off
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
PACKAGES := configs router expert_trainer server deploy

RUNTIME := $(VENV)/.runtime-$(EXTRA)
DEV := $(VENV)/.dev

.PHONY: help
help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo
	@echo "  make demo ARGS=\"--once --report demo.json\"    pass arguments through"
	@echo "  make demo EXTRA=gpu                            install the GPU build instead"

.PHONY: demo
demo: $(RUNTIME) ## Train experts from nothing, serve them, ask them questions; Ctrl-C ends it
	@exec $(BIN)/introvert demo $(ARGS)

.PHONY: test
test: lint ## Lint, type-check and run every test, engines included
	$(BIN)/python -m pytest $(ARGS)

.PHONY: test-fast
test-fast: $(DEV) ## The tests that start no engine
	$(BIN)/python -m pytest -m "not e2e" $(ARGS)

.PHONY: lint
lint: $(DEV) ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: $(DEV) ## Rewrite the code as ruff would have it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: $(DEV) ## Run every benchmark quickly; reports land in runs/bench
	@mkdir -p runs/bench
	@missed=0; for script in bench/[a-z]*.py; do \
	    echo "== $$script"; \
	    $(BIN)/python $$script --quick --report runs/bench/$$(basename $$script .py).json || missed=1; \
	done; exit $$missed

.PHONY: install
install: $(RUNTIME) ## Only set up .venv

.PHONY: lock
lock: $(DEV) ## Resolve the lock files anew
	$(BIN)/python -m pip --quiet install uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(LOCKS)/make-locks.sh

.PHONY: clean
clean: ## Remove .venv, caches and everything that runs made
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or give PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# PyTorch's CPU build comes from the configured package sources where they hold it, else from PyTorch's own index.
# CPU and GPU builds do not live in one environment.
.PHONY: only-one-build
only-one-build:
	@for other in $(filter-out $(RUNTIME),$(wildcard $(VENV)/.runtime-*)); do \
	    echo "make: $$other says that $(VENV) holds another build than $(EXTRA); run \`make clean\` first" >&2; exit 1; \
	done

$(VENV)/.runtime-cpu $(VENV)/.runtime-gpu: | only-one-build

$(VENV)/.runtime-cpu: $(BIN)/python $(LOCKS)/torch-cpu.txt $(LOCKS)/cpu.txt pyproject.toml
	@echo "Installing Introvert for CPU into $(VENV) (once, a few minutes) …" >&2
	@$(PIP) -r $(LOCKS)/torch-cpu.txt 2>/dev/null || $(PIP) --index-url $(TORCH_CPU_INDEX) -r $(LOCKS)/torch-cpu.txt
	@$(PIP) --require-hashes -r $(LOCKS)/cpu.txt
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || \
	    { echo "make: vLLM's CPU build needs libnuma.so.1; install it (Debian: apt-get install libnuma1)" >&2; exit 1; }
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.runtime-gpu: $(BIN)/python $(LOCKS)/gpu.txt pyproject.toml
	@echo "Installing Introvert for GPU into $(VENV) (once) …" >&2
	@$(PIP) --require-hashes -r $(LOCKS)/gpu.txt
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(DEV): $(RUNTIME) $(LOCKS)/dev.txt
	@$(PIP) --require-hashes -r $(LOCKS)/dev.txt
	@touch $@
