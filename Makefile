# make demo    install into .venv, build, run the main job (README.md)
# make test    the same, then every test (compiles torch-cluster the first time: 10 to 20 minutes)
# make build   only install and build
# make clean   remove what was built; .venv stays
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
TORCH_CLUSTER := torch-cluster==1.6.3
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test build clean
.DELETE_ON_ERROR:

demo: build
	$(BIN)/mlff demo

test: build $(VENV)/.torch-cluster
	$(BIN)/python -m pytest

build: $(VENV)/.mlff
	@$(BIN)/cmake --build build

clean:
	rm -rf build $(VENV)/.mlff demo-output

# The environment. A stamp file says that a step is done, so the next `make` does not even ask.
$(VENV)/bin/python:
	@missing=""; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	command -v git >/dev/null || missing="$$missing git"; \
	command -v $(PYTHON) >/dev/null || missing="$$missing python3"; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -n "$$missing" ]; then echo "mlff needs packages of your system: sudo apt install$$missing" >&2; exit 1; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mlff needs Python 3.10 or newer, this is $$($(PYTHON) -V); choose another: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.mlff: pyproject.toml CMakeLists.txt $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --config-settings=build-dir=build --editable .
	@touch $@

# No wheel is published, and compiling it needs Python's header files. pip keeps the wheel in its cache.
$(VENV)/.torch-cluster: $(VENV)/.requirements
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "the tests need a package of your system: sudo apt install python3-dev" >&2; exit 1; }
	@echo "torch-cluster is compiled the first time, which takes 10 to 20 minutes"
	FORCE_ONLY_CPU=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps $(TORCH_CLUSTER)
	@touch $@
