# Every target sets up what it needs: a virtual environment in .venv with the exact
# versions of constraints.txt. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= demo
TEXT   ?=

.PHONY: demo test test-fast lint types check docs fuzz bench mutants lock clean
.DEFAULT_GOAL := check

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first: an installer that has a CPU build at hand should take that one.
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## train a full-rank and a ReLoRA twin, measure and compare them (OUT=demo, TEXT=dir of .txt)
	$(BIN)/python -m probes.relora demo $(OUT) $(if $(TEXT),--text $(TEXT))

# Whole files of tests in several processes, with one thread each. Files with slow tests begin first
# (tests/conftest.py); xdist would begin with those that have many tests.
PROCESSES ?= auto
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## run every test
	$(PYTEST)

test-fast: $(STAMP)  ## run the tests that neither train for long nor start processes, under 3 minutes
	$(PYTEST) -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: test lint types

docs: $(STAMP)  ## build the documentation site, docs/_build/html/index.html; needs no network
	$(BIN)/python -m sphinx -W -q docs docs/_build/html
	@echo docs/_build/html/index.html

EXAMPLES ?= 2000
fuzz: $(STAMP)  ## damage files in thousands of new ways (EXAMPLES per target), some minutes
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/dynamics/fuzz --timeout 3600

bench: $(STAMP)  ## what analysing and recording cost, and memory over a checkpoint of 8 GB, about 1 h
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python tests/benchmarks/whole_job.py
	$(BIN)/python tests/benchmarks/whole_job.py --size 1b --layers 1 --checkpoints 2
	$(BIN)/python tests/benchmarks/shapes.py
	$(BIN)/python tests/benchmarks/low_rank.py
	$(BIN)/python tests/benchmarks/scaling.py
	$(BIN)/python -m tests.benchmarks.recording --model micro
	$(BIN)/python -m tests.benchmarks.recording --model small
	$(BIN)/python -m tests.benchmarks.live --model micro
	$(BIN)/python -m tests.benchmarks.live --model small
	$(BIN)/python -m tests.benchmarks.killed_writers
	$(BIN)/python tests/benchmarks/large_checkpoint.py
	$(BIN)/python tests/benchmarks/large_checkpoint.py --stored fp8
	$(BIN)/python tests/benchmarks/large_checkpoint.py --stored nf4

MUTANTS ?= 60
SEED    ?= 0
mutants: $(STAMP)  ## change the code in MUTANTS random places (SEED), and see whether a test fails
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --sample $(MUTANTS) --seed $(SEED) $(ONLY)

lock:  ## write constraints.txt anew from the newest versions that pyproject.toml allows
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet "torch$(TORCH)"
	.venv-lock/bin/pip install --quiet --editable '.[dev,bench,mutants]'
	echo "# Exact versions that the project is tested with; written by 'make lock'." > constraints.txt
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/+cpu//' >> constraints.txt
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) demo mutants docs/_build docs/generated .pytest_cache .mypy_cache .ruff_cache
