# Each target does all its own set-up: it needs make and Python 3.10 or newer, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# The tests start many processes: without bytecode each would compile torch and Lightning anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-lowest coverage mutants release-check reliability docs lint types clean

demo: $(VENV)/.demo
	$(BIN)/lightning-aop demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4

test-slow: $(VENV)/.dev  ## minutes of CPU time; LIGHTNING_AOP_DATA names a folder of real photos
	$(BIN)/python -m pytest -m slow -s

test-lowest:  ## the tests with the lowest versions that pyproject.toml admits
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]" -c tests/constraints-lowest.txt
	$(VENV)-lowest/bin/python -m pytest -m "not slow" -W ignore::DeprecationWarning -n auto --maxprocesses 4

coverage: $(VENV)/.dev  ## which lines the tests run, those of the processes that they start included
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --cov --cov-report=term-missing:skip-covered

mutants: $(VENV)/.dev  ## change the maths a little, hundreds of times, and see that a test fails
	$(BIN)/python tests/mutants.py

release-check:  ## build, and try what was built in an empty environment, away from the repository
	rm -rf dist $(VENV)-release
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check build twine
	$(VENV)-release/bin/python -m build --outdir dist .
	$(VENV)-release/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(VENV)-release
	$(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[coco]"
	rm -rf dist/tried && mkdir dist/tried
	cd dist/tried && ../../$(VENV)-release/bin/lightning-aop --version
	cd dist/tried && ../../$(VENV)-release/bin/lightning-aop demo
	cd dist/tried && ../../$(VENV)-release/bin/python -m lightning_aop --help

reliability: $(VENV)/.dev  ## write the matrix of docs/reliability.md from its tests' results
	$(BIN)/python -m pytest tests/test_harmless.py --reliability docs/reliability.md

docs: $(VENV)/.dev  ## the site, to site/index.html; a broken link or docstring is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "lightning_aop needs Python 3.10 or newer; name one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[coco]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[dev]"
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) site demo_run runs .mypy_cache .ruff_cache .pytest_cache
