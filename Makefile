# Each target makes the environment it needs: `make demo` and `make test` work on a fresh clone
# with Python, git and make alone.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= python3.10
BIN := $(VENV)/bin

.PHONY: demo test fuzz lint types docs slow gpu bench lowest release clean

demo: $(VENV)/.cli  ## the main job: drawings inverted, brought back and redrawn; table and picture
	@echo "Inverting six drawings of emoji by three methods, and sampling them again: about a minute."
	$(BIN)/python -m benchmarks.figures.demo --out out/demo.png

test: lint types docs  ## everything CI runs
	$(BIN)/python -m pytest -n auto tests
	$(BIN)/python -m pytest README.md docs odesolvers models  # examples of a page build on each other

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy odesolvers odesolvers_command.py
	$(BIN)/mypy models

docs: $(VENV)/.dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

fuzz: $(VENV)/.dev  ## a minute of files with random changes and of properties, with a new seed
	seed=$$(date +%s) && echo "seed $$seed" \
	&& $(BIN)/python -m tests.hostile check fuzz $$seed 30 \
	&& $(BIN)/python -m pytest -q -n auto --hypothesis-seed=$$seed tests/test_files.py tests/test_values.py tests/test_parsing.py

slow: $(VENV)/.dev  ## the long tests
	$(BIN)/python -m pytest -n auto -m slow

gpu: $(VENV)/.dev  ## tests and measurements on a GPU, in 8 minutes: docs/tables/gpu_*.md
	$(BIN)/python -m pytest -q -rs -n 4 -m "cuda and not slow" tests
	$(BIN)/python -m benchmarks.gpu --write

bench: $(VENV)/.dev  ## samplers and inverters side by side: tables and plots in docs; hours, resumable
	$(BIN)/python -m benchmarks.suite

lowest: $(VENV)/.dev  ## tests of the core at the lowest versions that pyproject.toml allows
	$(BIN)/python -m benchmarks.installs --lowest $(LOWEST)

release:  ## a checked wheel and sdist in dist; uploads nothing
	rm -rf dist build
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install -q build twine
	build/release/bin/python -m build
	build/release/bin/twine check --strict dist/*
	@echo "To upload them, with a token of PyPI: build/release/bin/twine upload dist/*"

$(VENV)/.cli: pyproject.toml
	@echo "Installing torch and the command line into $(VENV): 5 GB, up to 3 GB of them downloads; silent for minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[cli]'
	touch $@

$(VENV)/.dev: pyproject.toml
	@echo "Installing torch and all that the tests need into $(VENV): 7 GB, up to 3.5 GB of them downloads; silent for minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@ $(VENV)/.cli

clean:
	rm -rf $(VENV) build dist docs/_build out *.egg-info
