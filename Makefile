# make demo   sets everything up and runs the main job: six facts into a real language model, and out again
# make test   sets everything up and passes the tests
# make families  compares every decoder family with the plain model (docs/families.md)
# make versions  tests the package beside other versions of torch and transformers
# make docs   builds the documentation's site into site/
# All use .venv and may be run again and again.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo docs test suites faults families versions lint setup clean

# OpenMP threads that wait by spinning starve each other on a busy machine (10x and more); sleeping ones do not.
demo: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/knowedit demo --output demo

setup: $(READY)

# Byte code is made when a module is first imported, of what is imported: of everything it takes a minute and a half.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# uv takes a sixth of pip's time for the many small packages; pip stands in, soon, where uv finds no registry.
UV  := UV_HTTP_TIMEOUT=20 UV_HTTP_RETRIES=1 $(BIN)/uv pip install --quiet --python $(BIN)/python

# Torch first, with pip's own settings, which may name a CPU build. That one brings no Triton, and the tests need the
# version they are pinned to.
$(READY): pyproject.toml setup.py constraints.txt
	@echo "== setting up $(VENV) (once; about a minute and 2.5 GB)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch uv
	$(BIN)/python -c 'import triton' 2>/dev/null || $(UV) triton==3.6.0 || $(PIP) triton==3.6.0
	$(UV) -c constraints.txt -e '.[dev]' || $(PIP) -c constraints.txt -e '.[dev]'
	@touch $(READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Three runs: Triton reads its interpreter switch when a kernel is defined, and codegen needs it off. Each run uses
# JOBS processes of one thread: threads that wait for each other at barriers crawl on a busy machine.
JOBS   ?= 2
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# The faults of tests/faults many times more, on one core; what came of them is in tests/faults/result.json.
faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.run --kills 1000 --fills 250 --inputs 1000000 --sequences 10000
	$(BIN)/python -m tests.faults.guided -runs=200000
	KNOWEDIT_FAULTS=$(or $(POINTS),200) $(PYTEST) tests/faults

# mypy uses one core for three quarters of a minute: the tests share what it leaves.
test: $(READY)
	@$(MAKE) --no-print-directory -j2 lint suites
	@echo "== all tests passed"

# The CPU kernels first, or each process would compile them for itself.
suites: $(READY)
	@echo "== CPU kernels"
	$(BIN)/python -c 'from knowedit_kernels import _native; _native.load()'
	@echo "== ordinary tests"
	$(PYTEST)
	@echo "== kernels in Triton's interpreter"
	TRITON_INTERPRET=1 $(PYTEST) tests/interpret
	@echo "== kernels compiled ahead of time for sm_80, sm_90 and sm_100"
	$(PYTEST) tests/codegen

# A fresh environment for each pair of versions, outside CI; what came of each is in tests/versions.json.
versions: $(READY)
	$(BIN)/python -m tests.versions

families: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.families --jobs $(JOBS)
	$(BIN)/python -m benchmarks.pages --write

# Its packages are installed here, not by the set-up: nothing else needs them.
docs: $(READY)
	$(BIN)/python -c 'import latex2mathml, material, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
