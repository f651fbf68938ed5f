# Two commands for a fresh machine: `make demo` and `make test`.
# They need Python >= 3.11 (as mlx-lm 0.32 does) and nothing else; everything goes into .venv.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# On Linux, MLX's code comes in an extra of its own; `make demo EXTRA=cuda` for a GPU.
EXTRA ?= $(if $(filter Linux,$(shell uname -s)),cpu,)
COMMA := ,
# `make test VLM=1` runs the tests of vision models too: 690 MB more, as CI does.
DEV := dev$(if $(VLM),-vlm)
MODEL := examples/books-20m

.PHONY: demo test test-all sweeps check bench docs dist clean

demo: $(VENV)/demo
	$(BIN)/mlx_tq.generate --model $(MODEL) --kv-bits 3 --max-tokens 40 --temp 0.7 \
		--top-p 0.9 --seed 7 --prompt - < examples/needle.txt

# Every law and every executed line of the kernels, on less data than `test-all`.
test: $(VENV)/$(DEV)
	@tests/system_packages.sh
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not sweep" $(PYTEST_ARGS)

test-all: test
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow $(PYTEST_ARGS)

# 2,000 requests of any fields, 500 with clients that hang up, and servers that are killed:
# some fifteen minutes.
sweeps: $(VENV)/dev
	$(BIN)/python -m pytest -m sweep $(PYTEST_ARGS)

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/mlx_tq.eval --model $(MODEL)

# These pages as a site: open site/index.html. Installing takes seconds, building two;
# nothing but the installation asks the network.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo site/index.html

# What a release uploads: the source archive and, made from it, the wheel.
dist: $(VENV)/dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) dist site

$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv found; install one or run make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/dist: $(VENV)/python
	$(BIN)/python -m pip install --quiet build twine
	@touch $@

$(VENV)/docs: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable '.[$(if $(EXTRA),$(EXTRA)$(COMMA),)dev,docs]'
	@touch $@

$(VENV)/demo: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.$(if $(EXTRA),[$(EXTRA)],)'
	@touch $@

$(VENV)/dev: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$(if $(EXTRA),$(EXTRA)$(COMMA),)dev]'
	@touch $@

$(VENV)/dev-vlm: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable '.[$(if $(EXTRA),$(EXTRA)$(COMMA),)dev,vlm]'
	@touch $@
