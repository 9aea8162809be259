# make notebooks · make test · make figures · make bench · make reproduce · make test-slow · make test-browser · make lint
# make clean
# make test and make test-slow run the TESTS that are named, by default all.
# Each makes .venv and installs what is needed, once; it is done again when the lists of packages change.

PYTHON ?= $(shell for name in python3.12 python3.11 python3.10 python3 python; do \
	command -v $$name >/dev/null 2>&1 && $$name -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

PROFILE ?= full

.PHONY: notebooks figures bench reproduce test test-slow test-browser lint clean
.DEFAULT_GOAL := notebooks

.venv/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.10, 3.11 or 3.12 found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $@

notebooks: .venv/installed
	$(BIN)/python tools/notebooks.py

figures: .venv/installed
	$(BIN)/python tools/notebooks.py --commit

.venv/bench-installed: .venv/installed benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --editable . --requirement benchmarks/requirements.txt
	@touch $@

bench: .venv/bench-installed
	$(BIN)/python benchmarks/run.py

reproduce: .venv/installed
	$(BIN)/python benchmarks/reproduce.py --profile $(PROFILE)

test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist worksteal $(TESTS)

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow --durations=0 $(TESTS)

test-browser: .venv/installed
	$(BIN)/python -m pytest -m browser --durations=3

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build .venv
