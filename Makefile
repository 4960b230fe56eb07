# Each target creates the virtual environment it needs; only Python and make must be installed by hand.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST := .oldest
CORE   := storage interventions base_models adapters evaluation data speed training config runs exchange

# libgomp's threads spin while they wait. Next to another busy process that is 20 to 80 times slower than sleeping.
# The variable has an effect only if it is set before Python starts.
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
# W&B writes its runs to disk, so no account is needed; a user's own setting takes precedence.
export WANDB_MODE ?= offline

BENCH_ARGS ?= --random
# An empty CONSTRAINTS= installs the newest versions that pyproject.toml allows, as one CI job does.
CONSTRAINTS ?= -c constraints.txt

# A slow package index drops connections: pip resumes, and the whole call is retried from its cache.
PIP_INSTALL = $(BIN)/python -m pip install --retries 10 --timeout 120 --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-oldest capabilities docs bench bench-gpu lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): about two minutes and 2.2 GB; pip prints nothing unless it fails"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@for attempt in 1 2 3; do \
	    $(PIP_INSTALL) -e ".[dev]" $(CONSTRAINTS) && break; \
	    test $$attempt -lt 3 || exit 1; \
	    echo "pip failed; attempt $$((attempt + 1)) of 3 in 10 s" >&2; sleep 10; \
	done
	touch $@

install: $(STAMP)  ## create the virtual environment

quickstart: $(STAMP)  ## train LoReFT on a 135M model, evaluate it, and show what it learned
	$(BIN)/reft-train experiment=quickstart

# One process per core with one thread each: small tensors do not benefit from more threads. The tests of a file stay
# together because they share fixtures.
test: $(STAMP)  ## run the tests that every change must pass: no network, no GPU, about 5 minutes on 2 cores
	HF_HUB_OFFLINE=1 WANDB_SILENT=true OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(STAMP)  ## run the slow tests
	HF_HUB_OFFLINE=1 WANDB_SILENT=true $(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

# All lower bounds of pyproject.toml as NAME==BOUND, up to the extras for developers.
$(OLDEST)/constraints.txt: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed '/^notebooks = /q' pyproject.toml | grep -oE '[A-Za-z0-9_-]+(\[[a-z]+\])?>=[0-9.]+' \
	    | sed -E 's/\[.*\]//; s/>=/==/; /^hatchling/d' | sort -u > $@.new
	$(OLDEST)/bin/python -m pip install --retries 10 --timeout 120 --disable-pip-version-check -q -c $@.new \
	    -e ".[quickstart,peft,report,search,cluster,judge,serve]" pytest pytest-timeout pytest-xdist hypothesis tensorboard
	mv $@.new $@

# Warnings are not errors here: new versions of indirect dependencies deprecate what the old packages use.
test-oldest: $(OLDEST)/constraints.txt  ## run the core tests on the oldest versions that pyproject.toml allows
	HF_HUB_OFFLINE=1 WANDB_SILENT=true OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --dist loadfile -W default \
	    -m "not slow and not gpu" $(addprefix tests/,$(CORE)) $(PYTEST_ARGS)

capabilities: $(STAMP)  ## probe every method on every kind of model, and write the tables in README and docs
	HF_HUB_OFFLINE=1 $(BIN)/python experiments/capabilities/probe.py

docs: $(STAMP)  ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

bench: $(STAMP)  ## compare speed and memory with pyreft, adapters and peft; about three hours (BENCH_ARGS="--quick --random")
	$(BIN)/python experiments/speed/bench.py $(BENCH_ARGS)

bench-gpu: $(STAMP)  ## measure the training step on a CUDA device: 135M, 1B and 8B shapes (GPU_ARGS="--shapes 1B")
	$(BIN)/python experiments/speed/gpu.py --make-peers $(GPU_ARGS)

lint: $(STAMP)  ## run ruff and pyright, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove virtual environments and caches; keep outputs/
	rm -rf $(VENV) $(OLDEST) .bench site .pytest_cache .ruff_cache build dist
