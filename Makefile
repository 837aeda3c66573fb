# Two commands: `make run` (the quickstart job) and `make test`. Each does its own set-up in .venv.
# `make test` runs two halves side by side: tests that start Ray, of which a machine holds one at a time, and all others.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/quickstart
# As in pyproject.toml, whose own -m these replace.
USUAL := not chaos and not gpu
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: run test test-ray test-rest lint clean
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
	@mkdir -p build/types/overtone  # the names that the folders are installed under
	@for name in jobs progressive cluster; do ln -sfn "$(CURDIR)/$$name" build/types/overtone/$$name; done
	$(BIN)/mypy

test: lint
	@$(MAKE) --no-print-directory -j2 test-ray test-rest

test-ray: $(VENV)/.test-ready
	$(BIN)/python -m pytest -m "ray and $(USUAL)"

# One thread, as two would only take turns with the other half. A test that starts Ray and is not marked so finds none
# at that address. Shown when all have ended.
test-rest: $(VENV)/.test-ready
	@mkdir -p build
	@OMP_NUM_THREADS=1 RAY_ADDRESS=127.0.0.1:1 $(BIN)/python -m pytest -m "not ray and $(USUAL)" > build/test-rest.log 2>&1; \
	code=$$?; cat build/test-rest.log; exit $$code

clean:
	rm -rf out build *.egg-info
