# `make` lists the targets. Each makes the virtual environment first if it is missing or older than its pins.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help sweep review test test-all test-gpu check audit clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

sweep: $(BIN)/.ready  ## run what is stale of the sweep in params.yaml, and make reports/report.html
	PYTHONPATH=src python -m prefscan launch --dirty
	@echo "Report: reports/report.html"

BASE ?= main
review: $(BIN)/.ready  ## print what a pull request shows its reviewer, against BASE=main
	@PYTHONPATH=src python -m prefscan review $(BASE)

test: $(BIN)/.ready  ## run the tests (6 to 16 minutes on 2 cores)
	python -m pytest

test-all: $(BIN)/.ready  ## run the slow tests too
	python -m pytest -m ""

test-gpu: $(BIN)/.ready  ## run the tests that need a CUDA GPU, which the others do not see
	python -m pytest -m gpu

check: $(BIN)/.ready  ## lint, format and type check, and the audit
	ruff check src tests benchmarks
	ruff format --check src tests benchmarks
	mypy
	@$(MAKE) --no-print-directory audit

# A known vulnerability fails; a machine that cannot ask is told so, since lack of a network must fail no check.
AUDIT := pip-audit --disable-pip --no-deps --progress-spinner off --requirement constraints.txt
audit: $(BIN)/.ready  ## look the pinned versions up among the known vulnerabilities
	@if found=$$($(AUDIT) 2>&1); then unknown=$$(echo "$$found" | grep -c 'could not be audited'); \
	elif echo "$$found" | grep -q '^Found [0-9]* known'; then echo "$$found"; exit 1; \
	else unknown=all; fi; \
	if [ "$$unknown" = 0 ]; then echo "No known vulnerability in a pinned version."; \
	else echo "NOT AUDITED, no answer: $$unknown of the pinned versions. Run make audit where pip-audit reaches its service."; fi

clean:  ## remove the virtual environment, caches and logs; DVC's cache and outputs stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build runs src/*.egg-info
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# pip comes pinned as well: one before 25.3 lets the links in an sdist lead it out of its folder (CVE-2025-8869). Then
# torch, first and pinned: a later package's loose range must not pull in another build.
$(BIN)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prefscan needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
