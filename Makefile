# The first target that is made creates the environment .venv. `make demo PYTHON=python3.12` chooses the Python for it;
# `make test PY=python` uses the active environment instead (`make install PY=python` installs into it).

PYTHON ?= python3
VENV ?= .venv
# Processes of `make test`, about 1.5 GB each; all tests of a file run in one of them.
TEST_PROCESSES ?= 2

ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.set-up
endif

PIP_INSTALL = $(PY) -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo studio test test-slow test-gpu test-browser test-notebooks bench bench-gpu lint format clean packages

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s%s\n", $$1, $$2}' Makefile

ifdef READY
install: $(READY)  ## set up .venv, or with PY=python the active environment
else
install: packages
endif

# torch is installed first, in the pinned version (with CUDA on a machine with a GPU); the later commands keep it.
packages:
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -q -e '.[dev]'
	$(PIP_INSTALL) -q --no-deps -r requirements-no-deps.txt

$(VENV)/.set-up: setup.py constraints.txt requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 10) else 0)'
	@echo "Setting up $(VENV); this takes a few minutes, once"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(MAKE) --no-print-directory packages PY=$(PY)
	@touch $@

demo: $(READY)  ## invert a sample concept, generate with it, show the images
	$(PY) scripts/demo.py

studio: $(READY)  ## open the page to train and generate in, on this machine
	@$(PY) -c 'import gradio' 2>/dev/null || $(PIP_INSTALL) -q -e '.[ui]'
	$(PY) scripts/studio.py --open

test: $(READY)  ## the fast tests: no network, no GPU
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-slow: $(READY)  ## the tests that take minutes
	$(PY) -m pytest -m 'slow and not gpu'

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(PY) -m pytest -m gpu

test-browser: $(READY)  ## the tests of the page in the system's Chromium
	@$(PY) -c 'import gradio, playwright' 2>/dev/null || $(PIP_INSTALL) -q -e '.[ui,browser]'
	$(PY) -m pytest -m browser

test-notebooks: $(READY)  ## execute both notebooks (minutes)
	@$(PY) -c 'import ipykernel, nbclient' 2>/dev/null || $(PIP_INSTALL) -q -e '.[notebooks]'
	$(PY) -m pytest -m slow tests/scripts/test_notebooks.py

bench: $(READY)  ## step time, overhead and time to concept on the CPU, into benchmarks/results (hours)
	$(PY) -m benchmarks.step_time embedded
	$(PY) -m benchmarks.step_time sd-v1
	$(PY) -m benchmarks.overhead
	$(PY) -m benchmarks.time_to_concept

bench-gpu: $(READY)  ## step time and memory on a CUDA device, at 512 x 512
	$(PY) -m benchmarks.step_time sd-v1 --device cuda --size 512 --rounds 50 --warm_up 10

lint: $(READY)  ## ruff (rules and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)  ## format the files with ruff
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove caches and files of packaging; .venv, logs, outputs and the training data in build/ stay
	rm -rf build/lib build/bdist.* dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
