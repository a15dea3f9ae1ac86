# Every target sets up what it needs: `make demo` and `make test` work on a machine that has make and
# Python 3.11 (with venv), nothing else.
#
#   PYTHON=python3.12 make test         the interpreter that the environment is made with
#   TASKPACK_VENV=/tmp/env make test    where the environment lives

PYTHON ?= python3
TASKPACK_VENV ?= .venv

BIN := $(TASKPACK_VENV)/bin
INSTALLED := $(TASKPACK_VENV)/.taskpack-installed

.PHONY: help demo test lint format docs constraints clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' Makefile | awk -F ': ' '{ printf "make %-12s %s\n", $$1, $$2 }'

demo: $(INSTALLED)  ## run the whole pipeline on embedded data, on this machine
	$(BIN)/taskpack demo

test: $(INSTALLED)  ## run the tests, four files at a time: many of them wait for processes
	$(BIN)/pytest --numprocesses=4 --dist=loadfile --no-loadscope-reorder

lint: $(INSTALLED)  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED)  ## build the documentation site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED)  ## format the code and fix what ruff can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

constraints:  ## pin every version that the environment holds now
	@test -x $(BIN)/pip || { echo "make constraints: $(TASKPACK_VENV) holds no environment to pin; run 'make test' first" >&2; exit 1; }
	@echo "# Every version this project is built and tested with; 'make constraints' writes what the environment holds." > constraints.txt.new
	@echo "# To move a package: '.venv/bin/pip install --upgrade NAME', 'make lint test', 'make constraints'." >> constraints.txt.new
	$(BIN)/pip freeze --exclude-editable --exclude taskpack --exclude pip --exclude setuptools >> constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:  ## remove what these targets made
	@if grep -qs "^prompt = 'taskpack'" $(TASKPACK_VENV)/pyvenv.cfg; then rm -rf $(TASKPACK_VENV); fi
	rm -rf build/site taskpack.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis constraints.txt.new
	find $(wildcard pipeline tests benchmarks) -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so a failed install is tried again; 'python -m venv' repairs a folder in
# which it failed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	    echo "taskpack needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2> /dev/null || echo not there)." >&2; \
	    echo "Name another interpreter: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@rm -f $@
	@$(BIN)/pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --prompt taskpack $(TASKPACK_VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
