# Needs Python >= 3.11 with venv, make and the package registry; nothing else.
# Everything is installed into .venv; a stamp keeps a second `make` from installing again, a changed pyproject.toml undoes it.
PYTHON ?= python3
# Test processes; each holds its own torch (about 0.7 GB), so no more than 8 however many cores there are.
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test test-floors lint format clean

demo: $(VENV)/.installed
	$(BIN)/unclip generate "a small red circle above a large blue square" -n 16 --keep 4 --out demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8

# The tests beside the lowest versions that pyproject.toml allows, without lint. They have wheels for Python 3.11 and 3.12.
test-floors: FLOORS := $(VENV)-floors
test-floors:
	$(PYTHON) .ci/floors.py > $(CURDIR)/$(FLOORS).txt
	PIP_CONSTRAINT=$(CURDIR)/$(FLOORS).txt $(MAKE) VENV=$(FLOORS) $(FLOORS)/.installed-test
	$(FLOORS)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    f"unclip needs Python 3.11 or newer, this is {v[0]}.{v[1]}; run: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --editable '.[test]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) $(VENV)-floors $(VENV)-floors.txt build *.egg-info
