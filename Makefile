# Everything a developer runs. Needs only Python and make: the first target to need it sets up .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup test test-all lint

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install --quiet "torch>=2.10"
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[all]"
	touch $@

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Three processes: with Triton's interpreter on nothing can be compiled, and the rest should not pay for either.
test: lint
	$(PY) -m pytest tests -q -m "not slow"

test-all: lint
	$(PY) -m pytest tests -q
