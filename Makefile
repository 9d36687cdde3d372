# `make` sets up .venv, runs the whole curriculum and prints the table; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Pipeline stages run with the caller's PATH, so that `python` is the one that has the packages.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check

# For targets that only look: they say what is missing, and install nothing.
ONLY_IF_SET_UP = $(VENV)/bin/python -c 'import coconut, typer' 2>/dev/null || { \
	echo "make $@: no environment in $(VENV); run \`make setup\` first (1 to 3 minutes, 1.8 GB)" >&2; exit 1; }

.DEFAULT_GOAL := all
.PHONY: all help setup trackers repro table report test test-all test-fast check format bench overnight status compare prune clean

all: repro  ## set up, run the pipeline, print the table and the path of the page
	@python -m coconut table
	@python -m coconut report

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## .venv from the lock file: 1 to 3 minutes, 1.8 GB

# The lock names versions, not builds: pip takes the torch build that fits the machine.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --editable .
	touch $@

trackers: $(STAMP)  ## add wandb and tensorboard, for `runtime.tracker` and their tests
	$(PIP) -r requirements-trackers.lock

repro: $(STAMP)  ## repair what a killed dvc left, then run what is out of date, branches side by side
	@python stages/digest_code.py  # The next line refuses to run on digests of other code.
	@python stages/params.py  # Both are stages too, but DVC reports a cycle or a missing parent in fewer words.
	@python -m coconut repair
	@python -m coconut repro || { status=$$?; python -m coconut report || true; \
		echo "make repro: dvc ended with exit code $$status; \`make status\` shows what runs and what failed" >&2; exit $$status; }

table:  ## print the table of accuracies
	@$(ONLY_IF_SET_UP)
	@python -m coconut table

report:  ## print the path of the page; after a failure write one of what there is
	@$(ONLY_IF_SET_UP)
	@python -m coconut report

status:  ## what is running, what is done, what is waiting
	@$(ONLY_IF_SET_UP)
	@python -m coconut status

compare:  ## mean and interval over seeds, paired tests: make compare EXPERIMENTS="one two"
	@$(ONLY_IF_SET_UP)
	@python -m coconut compare $(EXPERIMENTS)

overnight: $(STAMP)  ## dvc repro -k until it is done or cannot go on, with a summary
	python -m coconut overnight

prune:  ## delete resume states that nothing would use
	@$(ONLY_IF_SET_UP)
	@python -m coconut prune

test: $(STAMP)  ## the tests, 17 to 22 minutes on two cores
	python -m pytest -n auto --dist worksteal -m "not long"

test-all: $(STAMP)  ## these and the long ones, of many kills, processes and devices; an hour
	python -m pytest -n auto --dist worksteal

test-fast: $(STAMP)  ## the tests that take seconds
	python -m pytest -n auto --dist worksteal -m "not slow and not long"

check: $(STAMP)  ## ruff format, ruff check, mypy --strict
	ruff format --check .
	ruff check .
	mypy

format: $(STAMP)  ## let ruff fix what it can
	ruff format .
	ruff check --fix .

bench: $(STAMP)  ## speed and memory, tables and figures into benchmarks/
	python benchmarks/bench.py

# Name by name: `git clean` would also take the raw data and the models, which git ignores.
clean:  ## remove what the pipeline and the tools made; metrics, .resume, .venv and DVC's cache stay
	rm -rf data/examples data/encoded outputs/params.checked outputs/code outputs/report outputs/partial-report \
		outputs/comparison outputs/logs outputs/overnight outputs/evaluations/*.json outputs/probes/*.json \
		outputs/*/checkpoint outputs/*/*.partial outputs/*/*.safetensors outputs/*/*.csv outputs/*/*.jsonl \
		outputs/*/train.json outputs/*/predictions outputs/.*.unfinished outputs/*/.*.unfinished \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
