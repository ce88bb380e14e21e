# specquant: `make demo` shows what it does; `make check` runs everything that guards it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo check format test clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## decode real text with every scheme and method, then write the report
	$(BIN)/specquant run experiment=demo
	$(BIN)/specquant cost experiment=demo
	$(BIN)/specquant report campaign=demo

check: $(VENV)/.dev ## format, lint, types, import rules, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadfile

format: $(VENV)/.dev ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(VENV)/.dev ## the tests alone
	$(BIN)/pytest -n 2 --dist loadfile

clean: ## remove the environment and every generated result
	rm -rf $(VENV) results/demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python must be 3.11 to 3.13, got $$($(PYTHON) --version); try make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python needs its venv module; on Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[report]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@# Its classes pack as ever, but what it requires excludes what we do; it has wheels up to 3.11.
	@! $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  $(INSTALL) --no-deps auto-gptq
	@touch $@ $(VENV)/.demo
