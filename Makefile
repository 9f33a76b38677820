# `make train` and `make test` are all a newcomer needs: both set up .venv first, once.
#
#   PYTHON=python3.12   the interpreter .venv is made with (default: python3 if it is 3.11 or 3.12)
#   TARGET=gpu          install requirements/gpu.txt in place of cpu.txt
#   MARKS="..."         which of the slow tests make test-rest and test-all run; CI: "not exhaustive"
#   CONFIG=file.yaml    the pipeline that `make train` runs
#   ARGS="..."          added to the command of train, test, chaos, mutants, lint or types

.DEFAULT_GOAL := help
.PHONY: help setup train paper test test-rest test-all chaos mutants lint types pins clean

CONFIG ?= configs/pipeline.yaml
ARGS ?=
MARKS ?= slow
BIN := .venv/bin
# Two processes, a file of tests to each at a time: what a file starts for all its tests is started once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

setup:  ## make .venv with the pinned packages; does nothing when it is there
	@PYTHON="$(PYTHON)" ./requirements/setup.sh $(TARGET)

train: setup  ## run the quickstart: label, reward model, RL, evaluation; cached
	$(BIN)/keel pipeline $(CONFIG) $(ARGS)

paper: setup  ## make the paper's experiment in small and write benchmarks/maxent/RESULTS.md: hours, resumable
	bash benchmarks/maxent/paper.sh

test: setup  ## run the tests but the slow ones, in about 14 minutes; ARGS="--randomly-seed=N": in that order again
	$(PYTEST) -m "not slow" $(ARGS)

test-rest: setup  ## run the slow tests: stages, jobs, recovery, every objective and a short chaos run on the real stack
	$(PYTEST) -m "slow and ($(MARKS))" $(ARGS)

test-all:  ## run every test once: make test, then make test-rest
	$(MAKE) test
	$(MAKE) test-rest

chaos: setup  ## a real run through a hundred faults; ARGS="--faults 20 --seed 1 --staleness 1"
	$(BIN)/python tests/chaos/chaos.py $(ARGS)

mutants: setup  ## change the code in one place at a time: which unit test notices? ARGS="--sample 200 --seed 1"
	$(BIN)/python tests/mutants/mutants.py $(ARGS)

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check $(ARGS) .
	$(BIN)/ruff format --check $(ARGS) .

types: setup  ## mypy
	$(BIN)/mypy $(ARGS)

pins:  ## resolve requirements/*.txt again; UPGRADE=1 takes the newest versions
	@PYTHON="$(PYTHON)" UPGRADE="$(UPGRADE)" ./requirements/refresh.sh

clean:  ## remove .venv and all caches; runs/ stays
	rm -rf .venv .venv.old dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find system tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
