# make demo: a network hardened, exported and validated in a few minutes.   make test: the whole check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
STAMP := $(VENV)/.installed
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit package install docs docker-test fuzz clean

help: ## This list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## Make .venv and install everything into it.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "resq-deploy needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# one thread: so small a network gains nothing from more, and stalls on a busy machine
demo: $(STAMP) ## Harden, export and validate a small network; ends with the path of the report.
	rm -rf $(DEMO) && mkdir -p $(DEMO)
	OMP_NUM_THREADS=1 $(BIN)/resq-harden resnet8 --data digits --threads 1 -o $(DEMO)/model.pt
	OMP_NUM_THREADS=1 $(BIN)/resq-export $(DEMO)/model.pt -o $(DEMO)/model.resq
	$(BIN)/resq-validate $(DEMO)/model.resq -o $(DEMO)/report \
	    --ber 1e-4,1e-3,1e-2 --require 'accuracy >= 0.9' --require 'low(accuracy@ber=1e-3) >= 0.9'
	@echo "The report: $(abspath $(DEMO)/report/report.html)"

test: lint types unit package docs ## The whole check: lint, types, tests, packaging guards, documents.

lint: $(STAMP) ## Style.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Types, strict, of the package and its tests.
	$(BIN)/mypy

unit: $(STAMP) ## The tests.
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

package: $(STAMP) ## sdist -> wheel -> environments without torch: modules import, commands answer, attacks run.
	$(BIN)/python -m tests.packaging
	$(BIN)/python -m tests.on_device

docs: $(STAMP) ## The documentation site, into build/site; no warnings.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

fuzz: $(STAMP) ## 100,000 mutated inputs for every reader of outside data; takes minutes.
	$(BIN)/pip install --quiet -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz

docker-test: ## Build the CPU images and run an export in a container, where a Docker engine runs.
	docker/test.sh

clean: ## Remove what this file made.
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
