# The two commands of the README. Each sets up what it needs, once; running it again does only what is left to do.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-fast lint clean

# Two processes, or one on a machine with one GPU: a process needs a GPU of its own.
train: .venv/.installed
	$(BIN)/distrib launch --processes \
		$$($(BIN)/python -c 'import torch; print(min(torch.accelerator.device_count() or 2, 2))') configs/digits.yaml

test: .venv/.installed-dev
	$(BIN)/python -m pytest

# For the inner loop: without what starts processes.
test-fast: .venv/.installed-dev
	$(BIN)/python -m pytest -m 'not slow'

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf .venv runs

# A stamp is newer than what it was made from, so that a changed pin installs again.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[examples]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
