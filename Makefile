# The one door to everything: `make` lists what it can do. Every target builds .venv first where that is missing or old.
PYTHON ?= python3
SCALE ?= demo
WORKERS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
RUNS ?= runs
SEEDS ?=
ARGS ?=

BIN := .venv/bin
PAPERS := app-progressive backdoor-lth certified-pruning diverse-vit double-win-lth optimizer-amalgamation sparse-gan symbolic-l2o uvc-vit vit-antioversmooth
comma := ,
empty :=
space := $(empty) $(empty)
seeds := $(if $(SEEDS),--study.seeds "[$(subst $(space),$(comma),$(strip $(SEEDS)))]")

.PHONY: help setup test lint bench report clean reproduce-all $(PAPERS:%=reproduce-%)
.DEFAULT_GOAL := help

help:  ## this list
	@echo "Ten papers, one house. Targets:"
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 28 | sed 's/^/  make /'
	@for paper in $(PAPERS); do echo "  make reproduce-$$paper"; done
	@echo "Settings: SCALE=smoke|demo|cifar|paper (now $(SCALE)), SEEDS=\"0 1 2\", WORKERS=$(WORKERS), RUNS=$(RUNS),"
	@echo "  ARGS=\"--any.option value\" (all options: make reproduce-<paper> ARGS=--help), PYTHON=$(PYTHON)"

setup: .venv/ready  ## build .venv with everything pinned in constraints.txt

.venv/ready: pyproject.toml constraints.txt
	@test -e .venv/made || { \
	  $(PYTHON) -c 'import sys; sys.exit((3, 11) > sys.version_info[:2] or sys.version_info[:2] > (3, 13))' || \
	    { echo "error: PYTHON must be Python 3.11 to 3.13, got $(PYTHON)"; exit 2; }; \
	  echo "building .venv (once, a few minutes) ..."; $(PYTHON) -m venv --clear .venv && touch .venv/made; }
	@quiet=$$(test -t 1 || echo --quiet); \
	  $(BIN)/python -m pip install $$quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' && \
	  $(BIN)/python -m pip install $$quiet --disable-pip-version-check --constraint constraints.txt --no-deps auto_LiRPA
	@touch $@

$(PAPERS:%=reproduce-%): reproduce-%: .venv/ready  ## reproduce one paper: runs, judged claims, report
	@$(BIN)/python -m $(subst -,_,$*).reproduce --scale $(SCALE) --study.workers $(WORKERS) --study.runs "$(RUNS)" $(seeds) $(ARGS)

reproduce-all: .venv/ready  ## all papers one after another (75 minutes at demo), then one table of verdicts and report.html
	@for paper in $(subst -,_,$(PAPERS)); do \
	  $(BIN)/python -m $$paper.reproduce --scale $(SCALE) --study.workers $(WORKERS) --study.runs "$(RUNS)" $(seeds) $(ARGS); \
	  status=$$?; test $$status -lt 128 || exit $$status; test $$status -eq 0 || failed="$$failed $$paper"; \
	done; \
	$(BIN)/python -m common.house report.html */results/$(SCALE).json && test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

test: lint  ## lint, types, import rules, tests: of common/ with a coverage floor, of each paper with nothing but common/
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov --cov-fail-under=85 common
	@$(BIN)/python common/tests/carry_away.py $(subst -,_,$(PAPERS))

lint: .venv/ready  ## ruff, mypy and the import rules only
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy common $(subst -,_,$(PAPERS))
	@$(BIN)/lint-imports --no-cache

bench: .venv/ready  ## efficient forms against plain ones, as ratios: results/bench.md (on an idle machine, half an hour)
	@$(BIN)/python -m common.bench results/bench.md */benchmarks/*.py

report: .venv/ready  ## one page of all results, report.html, and each paper's own, from the stored results
	@$(BIN)/python -m common.claims */results/*.json
	@$(BIN)/python -m common.house report.html */results/*.json

clean:  ## remove runs/ and caches; keeps .venv, data and results
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
