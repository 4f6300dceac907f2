# `make train` and `make test` set up .venv on their first run.
PYTHON ?= python3
VENV ?= .venv
ENV ?= Hopper-v5
STEPS ?= 10000
PYTEST_ARGS ?=

PIP_INSTALL = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES = setup.py _sb3_polygrad_zoo_hook.py sb3_polygrad examples tests

.PHONY: venv train test test-slow format lint type commit-checks clean

train: $(VENV)/.installed-train
	$(VENV)/bin/python examples/train.py --env $(ENV) --steps $(STEPS)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m slow $(PYTEST_ARGS)

venv: $(VENV)/.installed-dev

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --select I --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)

type: $(VENV)/.installed-dev
	$(VENV)/bin/mypy

commit-checks: format lint type test

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)

# What training from the checkout needs: the simulator, the progress bar and the figure.
$(VENV)/.installed-train: setup.py constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[mujoco,progress,plots]"
	touch $@

$(VENV)/.installed-dev: setup.py constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[mujoco,progress,plots,benchmark,study,zoo,tests,dev]"
	touch $@ $(VENV)/.installed-train
