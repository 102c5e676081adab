# Each target makes the environment it needs: `make demo` and `make test` work on a fresh clone
# with Python, git and make alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types docs slow bench clean

demo: $(VENV)/.cli  ## the main job: sample digits, invert them, sample again; table and picture
	$(BIN)/odesolvers roundtrip --out out/roundtrip.png

test: lint types docs  ## everything CI runs
	$(BIN)/python -m pytest -n auto tests
	$(BIN)/python -m pytest README.md docs odesolvers models  # examples of a page build on each other

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy odesolvers
	$(BIN)/mypy models

docs: $(VENV)/.dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

slow: $(VENV)/.dev  ## the long tests
	$(BIN)/python -m pytest -n auto -m slow

bench: $(VENV)/.dev  ## samplers and inverters side by side: tables and plots in docs; hours, resumable
	$(BIN)/python -m benchmarks.suite

$(VENV)/.cli: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[cli]'
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@ $(VENV)/.cli

clean:
	rm -rf $(VENV) build docs/_build out *.egg-info
