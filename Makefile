# leon_jax. Needs Python 3.12 and make; `make peers` also needs Python 3.11.
# `make` alone lists what there is.

PYTHON ?= python3.12
PEERS_PYTHON ?= python3.11
BIN := .venv/bin
# Processes for pytest-xdist: one a core, 8 at most; 0 runs the tests in pytest's own process.
PYTEST_WORKERS ?= auto
# More arguments for pytest, for example: make test PYTEST_ARGS="tests/models -x"
PYTEST_ARGS ?=
DEMO_OUT ?= out/demo

# A module's tests stay in one process, for its fixtures. A process that dies ends the run: another
# would repeat the test that it died of, up to four times for each process.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(PYTEST_WORKERS) --maxprocesses=8 \
  --max-worker-restart=0 --dist=loadscope --durations=15

INSTALLED := .venv/.installed
PEERS_INSTALLED := .venv-peers/.installed
TPU_INSTALLED := .tpu/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test slowtest lint format docs weights peers tpu lock clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with everything that use, training and development need

# Exactly the locked packages, each checked against its hash; then this package, editable.
$(INSTALLED): requirements/dev.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 12))' || \
	  { echo "leon_jax needs Python 3.12 or newer: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Installing into .venv: about 500 MB to download, a minute or two"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: install ## Run everything once with the shipped model; makes out/demo/index.html
	$(BIN)/leon demo --out=$(DEMO_OUT)

# The compiler takes most of the time of the tests, and their programs are small.
test slowtest: export XLA_FLAGS += --xla_backend_optimization_level=0
test: install ## Run the tests but the slow ones (set PYTEST_ARGS or PYTEST_WORKERS to change how)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

slowtest: install ## Run the slow tests, which .ci/run runs too
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: install ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install ## Rewrite files in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: install ## Check the pages: links, commands, flags and code examples
	$(BIN)/python -m pytest tests/test_docs.py tests/test_setup.py

weights: install ## Train the shipped model again, from scratch (hours on a CPU)
	bash launch/weights.sh

peers: $(PEERS_INSTALLED) ## Make .venv-peers (PyTorch, transformers, ...) for the parity tests

$(PEERS_INSTALLED): requirements/peers.txt requirements/torch.txt
	test -x .venv-peers/bin/python || $(PEERS_PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --require-hashes --requirement requirements/peers.txt
	.venv-peers/bin/python -m pip install --quiet --requirement requirements/torch.txt
	@touch $@

tpu: install $(TPU_INSTALLED) ## Put the compiler for TPUs into .tpu, for the tests of leon plan

# Outside .venv, where JAX would look for a TPU whenever it starts.
$(TPU_INSTALLED): requirements/tpu.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --upgrade --target .tpu \
	  --requirement requirements/tpu.txt
	@touch $@

lock: install ## Resolve both environments again, into requirements/
	$(BIN)/uv pip compile --quiet --universal --python-version 3.12 --generate-hashes \
	  --no-header --no-annotate --upgrade --extra dev --output-file requirements/dev.txt setup.py
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --upgrade --output-file requirements/peers.txt requirements/peers.in

clean: ## Remove what was built or run here (never the environments, data/ or runs/)
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find leon_jax tests configs -name __pycache__ -type d -prune -exec rm -rf {} +
