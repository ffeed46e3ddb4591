# Every target sets up .venv by itself: `make test` works in a fresh clone with nothing installed.
# `make test TORCH=2.14.1`: the same with another torch than that of constraints.txt, in a .venv of its
# own.
PYTHON ?= python3
VENV := .venv$(if $(TORCH),-$(TORCH))
PY := $(VENV)/bin/python
ARGS ?=
# The zoo is no benchmark, gpu.py needs a CUDA card, spot_checks.py a version to compare with.
BENCHES := $(filter-out benchmarks/_% $(addprefix benchmarks/,zoo.py gpu.py spot_checks.py),\
	$(wildcard benchmarks/*.py))

# Models and data come from packages; nothing may ask a model hub.
export HF_HUB_OFFLINE := 1

# Where the environment forbids Python to keep bytecode, every process would compile all of torch and
# transformers anew, which takes longer than most benchmarks' short forms.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all interop fuzz lint bench

demo: $(VENV)/.stamp
	$(PY) examples/minilm.py $(ARGS)

# Two workers of one thread each, as most of a test is Python; `make test ARGS=tests/test_api.py`.
# Inductor compiles in the worker: a pool of processes would import torch for each that compiles.
PYTEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal

test: $(VENV)/.stamp
	$(PYTEST) -m "not slow and not clients" $(ARGS)

# Those that are marked slow or clients too: every benchmark's and example's short form, whole
# compilations, and the libraries that rewritten models meet (peft, Trainer, Lightning, ONNX, ...).
test-all: $(VENV)/.stamp $(VENV)/.clients
	$(PYTEST) $(ARGS)

# What every pass works with: runs the table and writes docs/interop.md.
interop: $(VENV)/.stamp $(VENV)/.clients
	PYTHONPATH=benchmarks:tests:tests/helpers $(PY) -m interop $(ARGS)

# `rewriter.passes` and `rewriter.kernels` exist only once installed (package-dir in pyproject.toml),
# so mypy reads an installed copy; `build` goes first, or setuptools would ship files deleted since.
lint: $(VENV)/.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	rm -rf build $(VENV)/typecheck
	$(PY) -m pip install -q --no-input --no-deps --no-build-isolation --target $(VENV)/typecheck .
	cd $(VENV)/typecheck && ../bin/python -m mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p rewriter

# All benchmarks, one after another; `make bench ARGS=--quick` for a short look.
bench: $(VENV)/.stamp $(VENV)/.clients
	@set -e; for bench in $(BENCHES); do echo "== $$bench"; $(PY) $$bench $(ARGS); done

# Random cases from SEED on: `make fuzz N=10000` of graphs (models and recipes), KIND=saves of damaged
# saves, kills of killed savers, turns of savers and readers. A case that fails is printed as its
# number.
KIND ?= graphs
N ?= 1000
SEED ?= 0
fuzz: $(VENV)/.stamp
	PYTHONPATH=tests:tests/helpers OMP_NUM_THREADS=1 $(PY) -m fuzz $(KIND) $(N) $(SEED)

# Without bytecode of all that is installed, which takes twice as long as the rest: what is imported
# compiles itself.
PIP := $(PY) -m pip install -q --no-input --no-compile

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed -e '' $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/' -e '/^setuptools==/d') constraints.txt \
		> $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.clients: $(VENV)/.stamp
	$(PIP) -c $(VENV)/constraints.txt -e ".[clients]"
	touch $@
