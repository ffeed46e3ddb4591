# Every target sets up .venv by itself: `make test` works in a fresh clone with nothing installed.
PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=
# The zoo is no benchmark, gpu.py needs a CUDA card, spot_checks.py a version to compare with.
BENCHES := $(filter-out benchmarks/_% $(addprefix benchmarks/,zoo.py gpu.py spot_checks.py),\
	$(wildcard benchmarks/*.py))

# Models and data come from packages; nothing may ask a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all interop fuzz lint bench

demo: .venv/.stamp
	$(PY) examples/minilm.py $(ARGS)

# Two workers of one thread each, as most of a test is Python; `make test ARGS=tests/test_api.py`.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist worksteal

test: .venv/.stamp
	$(PYTEST) -m "not slow and not clients" $(ARGS)

# Those that are marked slow or clients too: every benchmark's and example's short form, whole
# compilations, and the libraries that rewritten models meet (peft, Trainer, Lightning, ONNX, ...).
test-all: .venv/.stamp .venv/.clients
	$(PYTEST) $(ARGS)

# What every pass works with: runs the table and writes docs/interop.md.
interop: .venv/.stamp .venv/.clients
	PYTHONPATH=benchmarks:tests:tests/helpers $(PY) -m interop $(ARGS)

# `rewriter.passes` and `rewriter.kernels` exist only once installed (package-dir in pyproject.toml),
# so mypy reads an installed copy; `build` goes first, or setuptools would ship files deleted since.
lint: .venv/.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	rm -rf build .venv/typecheck
	$(PY) -m pip install -q --no-input --no-deps --no-build-isolation --target .venv/typecheck .
	cd .venv/typecheck && ../bin/python -m mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p rewriter

# All benchmarks, one after another; `make bench ARGS=--quick` for a short look.
bench: .venv/.stamp .venv/.clients
	@set -e; for bench in $(BENCHES); do echo "== $$bench"; $(PY) $$bench $(ARGS); done

# Random cases from SEED on: `make fuzz N=10000` of graphs (models and recipes), KIND=saves of damaged
# saves, kills of killed savers, turns of savers and readers. A case that fails is printed as its
# number.
KIND ?= graphs
N ?= 1000
SEED ?= 0
fuzz: .venv/.stamp
	PYTHONPATH=tests:tests/helpers OMP_NUM_THREADS=1 $(PY) -m fuzz $(KIND) $(N) $(SEED)

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --no-input -c constraints.txt -e ".[dev]"
	touch $@

.venv/.clients: .venv/.stamp
	$(PY) -m pip install -q --no-input -c constraints.txt -e ".[clients]"
	touch $@
