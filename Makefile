# Everything here needs Python >= 3.10 and pip, nothing else. A GPU is used where there is one.
#   make demo             plan, build and run one model's attention: on the GPU, or through the interpreter without one
#   make test             all tests that need no GPU
#   make lint             ruff, mypy, clang-format
#   make gpu-test         the tests that need a GPU
#   make clean            remove what the other targets made (but not .venv)
# Settings: PYTHON=python3.12, CUDA=cuda12 (for drivers older than 580), SPEC=specs/mistral-7b.yaml, JOBS=8

PYTHON ?= python3
CUDA ?= cuda13
SPEC ?= specs/llama3-8b.yaml
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(CUDA)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format gpu-test clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# The stamp is written last: an interrupted installation is taken up again, not trusted.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flashgen needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(CUDA),torch,plot,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/flashgen plan $(SPEC)
	$(BIN)/flashgen build $(SPEC) --out out
	$(BIN)/flashgen run $(SPEC)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) -m 'not gpu'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror templates/device/*.cuh tests/emulator/*.h

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i templates/device/*.cuh tests/emulator/*.h

gpu-test:
	scripts/gpu_tests.sh

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find flashgen tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
