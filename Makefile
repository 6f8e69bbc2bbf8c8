# The two commands: `make demo` and `make test`. Needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# A file's tests in one process: what they share is made once.
TESTS ?= -n 2 --dist loadfile

.PHONY: demo test check

demo: $(VENV)/.installed
	$(BIN)/gemwright demo --out runs/demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/python scripts/check

# A stamp a kind of installation: made again only when what is installed has changed. Python compiles what it imports.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) setuptools
	$(PIP) --no-compile --no-build-isolation -e '.[270m]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-compile --no-build-isolation -e '.[270m,dev]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gemwright needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
