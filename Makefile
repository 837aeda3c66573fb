# Two commands: `make run` (the quickstart job) and `make test`. Each does its own set-up in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/quickstart
# Without --no-compile pip compiles 22,000 modules, of which few are ever imported: 100 s of one core.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: run test lint clean
.DELETE_ON_ERROR:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Overtone needs Python 3.11 or later; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Overtone into $(VENV) (a few minutes, once)"
	@$(BIN)/python $(INSTALL) -e .
	@touch $@

$(VENV)/.test-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Overtone and its test tools into $(VENV) (a few minutes, once)"
	@$(BIN)/python $(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.run-ready

run: $(VENV)/.run-ready
	$(BIN)/overtone run manifests/quickstart.yaml --set output.path=$(OUT)

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf out build *.egg-info
