# The commands of a checkout. Everything is installed into .venv; a second call installs nothing.
#
#   make quickstart                 the main job; pass options as QUICKSTART="--steps 50 --output-dir runs/mine"
#   make test                       lint and the whole test suite; WORKERS=4 for more processes, TESTS=tests/data for a part

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test lint format clean

PYTHON ?= python3
WORKERS ?= 2
TESTS ?= tests
QUICKSTART ?=

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check --constraint constraints.txt
WHAT_TO_INSTALL := setup.cfg pyproject.toml constraints.txt

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/installed  ## install if needed, then train, continue and compare two tiny models on local text
	@echo "== hf-moe-cpt quickstart $(QUICKSTART)"
	@$(VENV)/bin/hf-moe-cpt quickstart $(QUICKSTART)

test: lint  ## install if needed, lint, then run the test suite
	@echo "== pytest $(TESTS), $(WORKERS) processes of one thread each"
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(WORKERS) $(TESTS)

lint: $(VENV)/installed-test  ## check style and formatting with ruff
	@echo "== ruff check"
	@$(VENV_PYTHON) -m ruff check .
	@echo "== ruff format --check"
	@$(VENV_PYTHON) -m ruff format --check .

format: $(VENV)/installed-test  ## let ruff repair style and formatting
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

clean:  ## remove the virtual environment and caches, never a run's output
	@echo "== removing $(VENV) and caches"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV_PYTHON):
	@echo "== creating the virtual environment $(VENV) with $(PYTHON)"
	@command -v "$(PYTHON)" > /dev/null || { echo "error: no program named $(PYTHON): install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot create virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }

$(VENV)/installed: $(WHAT_TO_INSTALL) | $(VENV_PYTHON)
	@echo "== installing the package with the versions of constraints.txt"
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-test: $(WHAT_TO_INSTALL) | $(VENV_PYTHON)
	@echo "== installing the package and what its tests need, with the versions of constraints.txt"
	@$(PIP_INSTALL) --editable ".[test]"
	@touch $(VENV)/installed $@
