# Each target makes the virtual environment it needs; nothing has to be installed by hand but Python and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST := .oldest
CORE   := storage interventions base_models adapters evaluation data speed training config runs exchange

# libgomp's threads spin while they wait: next to another busy process that is 20 to 80 times slower than sleeping.
# The variable counts only when it is set before Python starts.
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
# Without an account W&B writes its runs to disk; a user's own setting wins.
export WANDB_MODE ?= offline

BENCH_ARGS ?= --random
# CONSTRAINTS= installs the newest versions that pyproject.toml allows, as a job of continuous integration does.
CONSTRAINTS ?= -c constraints.txt

# A slow package index drops connections: pip resumes, and the whole call is tried again from its cache.
PIP_INSTALL = $(BIN)/python -m pip install --retries 10 --timeout 120 --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-oldest capabilities docs bench bench-gpu lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): about two minutes, 2.2 GB, and no further word of pip unless it fails"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@for attempt in 1 2 3; do \
	    $(PIP_INSTALL) -e ".[dev]" $(CONSTRAINTS) && break; \
	    test $$attempt -lt 3 || exit 1; \
	    echo "pip failed; attempt $$((attempt + 1)) of 3 in 10 s" >&2; sleep 10; \
	done
	touch $@

install: $(STAMP)  ## make the virtual environment

quickstart: $(STAMP)  ## train LoReFT on a 135M model, evaluate it, and say what it learned
	$(BIN)/reft-train experiment=quickstart

# One process for each core, each with one thread: small tensors gain nothing from more. The tests of a file stay
# together, as they share fixtures.
test: $(STAMP)  ## the tests a change must pass: no network, no GPU, about 7 minutes on 2 cores
	HF_HUB_OFFLINE=1 WANDB_SILENT=true OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the tests that take longer
	HF_HUB_OFFLINE=1 WANDB_SILENT=true $(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

# The lower bounds of pyproject.toml, all at once: what stands before the extras of developers, as NAME==BOUND.
$(OLDEST)/constraints.txt: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed '/^notebooks = /q' pyproject.toml | grep -oE '[A-Za-z0-9_-]+(\[[a-z]+\])?>=[0-9.]+' \
	    | sed -E 's/\[.*\]//; s/>=/==/; /^hatchling/d' | sort -u > $@.new
	$(OLDEST)/bin/python -m pip install --retries 10 --timeout 120 --disable-pip-version-check -q -c $@.new \
	    -e ".[quickstart,peft,report,search,cluster,judge,serve]" pytest pytest-timeout pytest-xdist hypothesis tensorboard
	mv $@.new $@

# Warnings are no errors there: new versions of what these need deprecate what old ones do.
test-oldest: $(OLDEST)/constraints.txt  ## the tests of the core on the oldest versions that pyproject.toml allows
	HF_HUB_OFFLINE=1 WANDB_SILENT=true OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --dist loadfile -W default \
	    -m "not slow and not gpu" $(addprefix tests/,$(CORE)) $(PYTEST_ARGS)

capabilities: $(STAMP)  ## probe every method on every kind of model, and write the tables of README and docs
	HF_HUB_OFFLINE=1 $(BIN)/python experiments/capabilities/probe.py

docs: $(STAMP)  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

bench: $(STAMP)  ## speed and memory next to pyreft, adapters and peft; about three hours (BENCH_ARGS="--quick --random")
	$(BIN)/python experiments/speed/bench.py $(BENCH_ARGS)

bench-gpu: $(STAMP)  ## the training step on a CUDA device: 135M, 1B and 8B shapes (GPU_ARGS="--shapes 1B")
	$(BIN)/python experiments/speed/gpu.py --make-peers $(GPU_ARGS)

lint: $(STAMP)  ## ruff and pyright, as in continuous integration
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environments and caches; outputs/ stays
	rm -rf $(VENV) $(OLDEST) .bench site .pytest_cache .ruff_cache build dist
