# `make` sets up .venv, runs the whole curriculum and prints the table; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Pipeline stages run with the caller's PATH, so that `python` is the one that has the packages.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.DEFAULT_GOAL := all
.PHONY: all help setup trackers repro table test test-fast check format bench overnight status compare clean

all: repro table  ## set up, run the pipeline, print the table

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## .venv from the lock file

# The lock names versions, not builds: pip takes the torch build that fits the machine.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

trackers: $(STAMP)  ## wandb and tensorboard too, for `runtime.tracker` and their tests
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-trackers.lock

repro: $(STAMP)  ## dvc repro: everything that is out of date
	@python stages/params.py  # Also a stage, but a cycle or a missing parent would end DVC first, in fewer words.
	@python -m coconut.pipeline.dvc_lock  # What a killed dvc left would end DVC, or have it run finished stages again.
	dvc repro

table: $(STAMP)  ## print the table of the last run
	@python -m coconut.report

test: $(STAMP)  ## every test
	python -m pytest -n auto

test-fast: $(STAMP)  ## the tests that take seconds
	python -m pytest -n auto -m "not slow"

check: $(STAMP)  ## ruff format, ruff check, mypy --strict
	ruff format --check .
	ruff check .
	mypy

format: $(STAMP)  ## let ruff mend what it can
	ruff format .
	ruff check --fix .

bench: $(STAMP)  ## speed and memory, tables and figures into benchmarks/
	python benchmarks/bench.py

overnight: $(STAMP)  ## dvc repro -k until it is done or cannot go on, with a summary
	python -m coconut.pipeline.overnight

status: $(STAMP)  ## what is running, what is done, what is waiting
	@python -m coconut.pipeline.status

compare: $(STAMP)  ## mean and interval over seeds, paired tests: make compare EXPERIMENTS="one two"
	@python -m coconut.report.compare $(EXPERIMENTS)

# Name by name: `git clean` would also take the raw data and the models, which git ignores.
clean:  ## remove what the pipeline and the tools made; metrics, .resume, .venv and DVC's cache stay
	rm -rf data/examples data/encoded outputs/params.checked outputs/report outputs/logs outputs/overnight \
		outputs/evaluations/*.json outputs/*/checkpoint outputs/*/checkpoint.partial outputs/*/history.csv \
		outputs/*/train.json outputs/*/predictions.jsonl outputs/.*.unfinished outputs/*/.*.unfinished \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
