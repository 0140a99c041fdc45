# Everything a developer runs. Needs only Python and make: the first target to need it sets up .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := $(VENV)/.torch
PACKAGES := $(VENV)/.packages
EXTENSION := $(VENV)/.extension

.PHONY: setup test test-compiled test-all matrix test-gpu gpu lint docs extension bench sanitize peft-suite demo \
  demo-serve demo-seeds evidence

setup: $(STAMP)

# pip unpacks on one core: the C++ extension, which needs torch alone, compiles on another.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(MAKE) $(TORCH)
	$(MAKE) --jobs 2 --output-sync $(PACKAGES) $(EXTENSION)
	-$(PY) -m compileall -qq -j 0 -x '/(tests|transformers/models)/' $(VENV)/lib  # on all cores; some files do not compile
	touch $@

$(TORCH):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install --quiet --no-compile "torch>=2.9"
	touch $@

$(PACKAGES): pyproject.toml
	RLRR_BUILD_CPP=0 $(PY) -m pip install --quiet --no-compile --no-build-isolation --editable ".[all]"
	touch $@

$(EXTENSION): setup.py $(wildcard csrc/* csrc/*/*)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

# The C++ extension alone, beside the sources; that it does not build is an error here.
extension: $(STAMP)
	RLRR_BUILD_CPP=1 $(PY) setup.py --quiet build_ext --inplace

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

# The pages under docs/ and an API reference as one site, in site/: a link or reference that leads nowhere is an error.
# Not --quiet: it drops the warnings that --strict counts.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

# Threads that spin while they wait make a training step up to eight times slower as soon as a core is shared.
test test-all demo demo-serve demo-seeds evidence: export OMP_WAIT_POLICY = PASSIVE

SHARED := -n 2 --dist worksteal  # both cores to the end: tests take from milliseconds to minutes

# Two processes: Triton's interpreter, which runs the kernels on the CPU, is on for a whole process or not at all, and
# with it nothing can be compiled. mypy takes one core, and tests wait now and then: they are run side by side.
test: $(STAMP)
	$(MAKE) --jobs 3 lint docs test-compiled
	TRITON_INTERPRET=1 $(PY) -m pytest tests -q $(SHARED) -m "interpreted and not slow"

test-compiled: $(STAMP)
	$(PY) -m pytest tests -q $(SHARED) -m "not slow and not gpu"

test-all: lint
	$(PY) -m pytest tests -q $(SHARED)
	TRITON_INTERPRET=1 $(PY) -m pytest tests -q $(SHARED) -m interpreted

# The suite with every supported torch and its Triton, an environment of 6 GB each, kept in .matrix: hours. Rows by
# their torch: make matrix ROWS="2.9 2.15"; .ci/matrix.py --help says what else MATRIX can be.
matrix:
	$(PYTHON) .ci/matrix.py $(ROWS) $(MATRIX)

# What no machine without a CUDA GPU can check; CI has none.
test-gpu: setup
	$(PY) -m pytest tests -q -m gpu

# Everything a GPU is needed for in one go: measurements first, then the tests, whose kernels are compiled by then. Takes
# the packages that PYTHON has and installs nothing: make gpu PYTHON=python3 OUT=results
OUT ?= results
MINUTES ?= 8
gpu:
	status=0; \
	PYTHONPATH=$(CURDIR) $(PYTHON) -m benchmarks.gpu --out $(OUT) --minutes $(MINUTES) || status=1; \
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest tests/test_gpu.py -q || status=1; \
	exit $$status

# The CPU benchmarks: about 10 minutes on two otherwise idle cores; rows, tables and picture go to benchmarks/results.
bench: $(STAMP)
	mkdir -p build
	for dtype in float32 bfloat16; do \
	  $(PY) -m pytest benchmarks/cpu/test_linear.py -q --benchmark-only -k $$dtype \
	    --benchmark-json build/linear_cpu_$$dtype.json || exit 1; \
	done
	$(PY) -m benchmarks.cpu.report build/linear_cpu_float32.json build/linear_cpu_bfloat16.json

# The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, then ThreadSanitizer.
sanitize: $(STAMP)
	PYTHON=$(CURDIR)/$(PY) csrc/sanitize.sh

# PEFT's own tests, unmodified, of RLRR as its method: fetches the sdist of the installed release, kept in build.
peft-suite: $(STAMP)
	$(PY) -m tests.peft.suite $(PEFT_SUITE)

# A real fine-tune on photographs, from the package index alone. A stopped one goes on; DEMO=--fresh starts anew.
demo: $(STAMP)
	$(VENV)/bin/rlrr demo $(DEMO)

# Two tasks on the same photographs, trained side by side and served by one process: DEMO="--port 9000 --train-only"
demo-serve: $(STAMP)
	$(VENV)/bin/rlrr demo-serve $(DEMO)

demo-seeds: $(STAMP)
	$(VENV)/bin/rlrr demo --out runs/demo-seeds --seed 1 --seed 2 --seed 3 $(DEMO)

# RLRR beside its rivals on two real datasets: hours on a CPU. A stopped one goes on; EVIDENCE="--datasets elpv" is a part.
evidence: $(STAMP)
	$(PY) -m benchmarks.evidence $(EVIDENCE)
