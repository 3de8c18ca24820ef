# `make demo` and `make test` do all the set-up; a second call finds it done.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test check clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH_CPU := https://download.pytorch.org/whl/cpu

# Without a GPU, offer pip the smaller CPU build of torch, if its index answers within 5 seconds.
define CPU_INDEX
if command -v nvidia-smi >/dev/null 2>&1; then :; \
elif $(BIN)/python -c "import urllib.request as u; u.urlopen('$(TORCH_CPU)/torch/', timeout=5)" 2>/dev/null; \
then echo "--extra-index-url $(TORCH_CPU)"; fi
endef

demo: $(VENV)/.installed
	$(BIN)/apothecary demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

$(BIN)/python:
	@python=$$(for name in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	  "$$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  && echo "$$name" && break; done || true); \
	test -n "$$python" || { \
	  echo "make: found no Python 3.11 or newer with venv; install one, or name it: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }; \
	echo "Creating $(VENV) with $$python"; "$$python" -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing apothecary and what it needs (several minutes the first time)"
	@$(PIP) -c constraints.txt $$($(CPU_INDEX)) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing the test tools"
	@$(PIP) -c constraints.txt $$($(CPU_INDEX)) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
