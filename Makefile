# Each target does all its own set-up: it needs make and Python 3.10 or newer, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The tests start many processes: without bytecode each would compile torch and Lightning anew.
unexport PYTHONDONTWRITEBYTECODE
# As many processes as cores run the tests, one thread each: more would wait for one another.
IN_PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-wide test-slow test-gpu test-others test-lowest coverage mutants release-check reliability docs \
	format lint types clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' \
	  | awk -F'|' '{ printf "make %-14s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo  ## train a small network for a minute, and say where to look
	$(BIN)/lightning-aop demo

test: $(VENV)/.dev  ## the tests, ten minutes or so; installs everything that any of them needs
	$(IN_PARALLEL) -m "not wide and not slow and not others"

test-quick: $(VENV)/.test  ## the tests that need only the extra `test`, which is faster to install
	$(IN_PARALLEL) -m "not wide and not slow and not others"

test-wide: $(VENV)/.dev  ## the tests of more networks, states, settings and processes
	$(IN_PARALLEL) -m "wide and not slow and not others"

test-slow: $(VENV)/.dev  ## the slow tests; LIGHTNING_AOP_DATA names a folder of real photos
	$(BIN)/python -m pytest -m slow -s

test-gpu: $(VENV)/.dev  ## the tests that need a CUDA device, and those of what runs on it
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest -m "not wide and not slow and not others" tests/model tests/methods tests/metrics tests/monitor/test_monitor.py

test-others:  ## other projects' modules, exports and loggers, in environments of their own
	$(PYTHON) -m venv $(VENV)-others
	$(VENV)-others/bin/python -m pip install --quiet --disable-pip-version-check -e . -r tests/scripts/others-requirements.txt
	$(VENV)-others/bin/python -m pytest -m others
	$(PYTHON) -m venv $(VENV)-exports
	$(VENV)-exports/bin/python -m pip install --quiet --disable-pip-version-check -e . -r tests/scripts/exports-requirements.txt
	$(VENV)-exports/bin/python -m pytest -m others tests/coco/test_tools.py
	$(PYTHON) -m venv $(VENV)-loggers
	$(VENV)-loggers/bin/python -m pip install --quiet --disable-pip-version-check -e . -r tests/scripts/loggers-requirements.txt
	$(VENV)-loggers/bin/python -m pytest tests/monitor/test_loggers.py

test-lowest:  ## the tests with the lowest versions that pyproject.toml admits
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -e ".[all-tests]" -c tests/constraints-lowest.txt
	$(VENV)-lowest/bin/python -m pytest -m "not slow and not others" -W ignore::DeprecationWarning -n auto --maxprocesses 4

coverage: $(VENV)/.dev  ## which lines the tests run, in the processes that they start too
	$(BIN)/python -m pytest -m "not slow and not others" -n auto --maxprocesses 4 --cov --cov-report=term-missing:skip-covered

mutants: $(VENV)/.dev  ## change the maths a little, hundreds of times, and see that a test fails
	$(BIN)/python tests/mutants.py

release-check:  ## build, and try the wheel in an empty environment, away from the repository
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
	$(BIN)/python -m pytest tests/monitor/test_harmless.py tests/monitor/test_harmless_kinds.py \
	  tests/monitor/test_monitor_distributed.py --reliability docs/reliability.md

docs: $(VENV)/.dev  ## the site, to site/index.html; a broken link or docstring is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev  ## format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.dev  ## ruff, which changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy --strict
	$(BIN)/mypy

clean:  ## remove the environment, the site and the caches; runs and their checkpoints stay
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "lightning_aop needs Python 3.10 or newer; name one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
# Python's own may be years old, and takes twice as long to resolve.
	$(INSTALL) --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(INSTALL) -e ".[coco]"
	@touch $@

$(VENV)/.test: pyproject.toml constraints-dev.txt | $(BIN)/python
	$(INSTALL) --no-compile -e ".[test]" -c constraints-dev.txt
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: pyproject.toml constraints-dev.txt | $(BIN)/python
	$(INSTALL) --no-compile -e ".[dev]" -c constraints-dev.txt
	@touch $@ $(VENV)/.demo $(VENV)/.test
