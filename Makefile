# SPDX-License-Identifier: MIT
# Needs only python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
STAMP  := $(VENV)/.installed
OUT    ?= results/demo

.DEFAULT_GOAL := help
.PHONY: help env demo test lint types unit docs hashes bench clean

help:  ## This list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

env: $(STAMP)  ## Create .venv with everything the project needs

# The stamp is rebuilt only when the declared dependencies change.
$(STAMP): pyproject.toml constraints.txt .ci/hashes.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ddpnopt needs Python 3.11 or newer")'
	@echo "setting up $(VENV) (about a minute)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# torch alone and pinned exactly: pip then takes the build that is meant for this machine, which is
# why it has no hash. All else is compared with the hashes; the last line finds it all installed.
	$(PIP) install --no-deps "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --no-deps --require-hashes -r .ci/hashes.txt
	$(PIP) install --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

demo: env  ## Train SGD, Adam, RMSprop and DDPNOpt on WINE and DIGITS (< 3 minutes)
	$(BIN)/ddpnopt demo --out $(OUT)

test: lint types unit docs  ## All checks: style, types, tests, documentation
	@echo "make test: style, types, tests and documentation are all in order."

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

# One torch thread per worker: two workers share two cores.
unit: env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -q

# Not --quiet: warnings that are not shown do not fail a strict build either.
docs: env  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

hashes:  ## Write .ci/hashes.txt anew from constraints.txt (needs uv)
	grep -v '^torch==' constraints.txt | uv pip compile --no-deps --generate-hashes --no-header \
		--no-annotate --quiet --output-file .ci/hashes.txt -

bench: env  ## Time, memory and operations of a step against plain SGD, beside the targets
	$(BIN)/ddpnopt bench --out results/bench

clean:  ## Remove what the other targets made
	rm -rf $(VENV) site results .pytest_cache .mypy_cache .ruff_cache .hypothesis
