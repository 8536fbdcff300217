# `make demo` and `make test` need Python ≥ 3.11 and nothing else: the first makes .venv, the next re-uses it.
PYTHON := .venv/bin/python
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check wheel bench docs runtime runtimes support

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@.ci/venv

demo: $(STAMP) ## compress, export and verify the embedded model; writes demo/ (table, plot, ONNX)
	$(PYTHON) experiments/demo.py

test: $(STAMP) ## the test suite, minutes: a process for each core, of one thread each
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 8 --dist loadfile

test-all: $(STAMP) ## with the slow tests and whatever third-party runtimes are installed
	$(PYTHON) -m pytest -m "slow or runtime or not slow"

check: $(STAMP) ## ruff, mypy over tinycompress and export, file sizes
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	@.ci/types
	@.ci/check-size

wheel: $(STAMP) ## builds the wheel, installs it into an empty environment, runs compress, export and verify there
	@PYTHON=$(PYTHON) .ci/wheel

bench: $(STAMP) ## measurements against transformers
	$(PYTHON) benchmarks/forward.py

docs: $(STAMP) ## the site, into site/
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(PYTHON) -m mkdocs build --strict

runtime: $(STAMP) ## a third-party runtime in an environment of its own, and its check: make runtime NAME=openvino
	@export/runtimes/install "$(NAME)"
	$(PYTHON) export/support.py --runtime "$(NAME)" --quick

runtimes: $(STAMP) ## all of them
	@for name in $$(cd export/runtimes && ls -d */ | tr -d /); do export/runtimes/install $$name || missing="$$missing $$name"; done; \
	$(PYTHON) export/support.py --quick && { [ -z "$$missing" ] || { echo "error: not installed:$$missing" >&2; exit 1; }; }

support: $(STAMP) ## every profile in every installed runtime; writes docs/support.md (long)
	$(PYTHON) export/support.py --out docs/support.md
