# make run     the main job on the embedded default; ARGS="--sandbox.scale smoke" passes options on
# make test    lint, types and tests
# make aot36   compiles the Triton kernels for GPUs that are not here, as CUDA torch's Triton does
# make docs    the documentation as a site, in build/site
# make env     what is installed, and which implementation each op takes
#
# The first of them sets up $(VENV). PY=python3 takes an interpreter that has the packages already,
# for example a machine's own CUDA torch, and installs nothing: make run PY=python3

ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

ifndef PY
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
PEERS := $(VENV)/.peers
endif

.PHONY: run test lint types unit aot36 docs env clean

run: $(READY)
	$(PY) -m srlm_fast.loop $(ARGS)

test: lint types unit

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m mypy

unit: $(READY) $(PEERS)
	$(PY) -m pytest $(PYTEST_ARGS)

# Beside the environment's own Triton, which is newer: no register may be spilled.
aot36: $(VENV)/triton36/.installed
	PYTHONPATH=$(VENV)/triton36 $(PY) tests/srlm_kernels/aot.py --triton 3.6.0 --max-spills 0

$(VENV)/triton36/.installed: $(READY)
	$(PY) -m pip install --no-deps --target $(@D) triton==3.6.0
	touch $@

docs: $(READY) $(PEERS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

env: $(READY)
	$(PY) -m srlm_fast.env

clean:
	rm -rf $(VENV)

# torch comes first and alone, so that building this package can never pull in a second one.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3))
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt setuptools torch
	$(VENV)/bin/python -m pip install -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

# What our results and speed are compared with, and what makes the documentation a site.
$(VENV)/.peers: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -c constraints.txt --no-build-isolation -e '.[bench,docs]'
	touch $@
