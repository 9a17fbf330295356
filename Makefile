# make demo: install what the demo needs and run it.   make test: install and run every test.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help demo test lint format bench prove browser clean

help:
	@echo "make demo    the whole way on real photographs; prints where its page is"
	@echo "make test    install everything and run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the benchmarks; results go to benchmarks/results"
	@echo "make prove   the store under faults: kills, a full disk, poisonous images, flipped bytes"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[cpu,demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[cpu,demo,dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/latentstore demo

# Two processes of one thread each: with more, small products on two cores wait for each other.
test: $(VENV)/.dev browser
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=12

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.cli_start
	$(BIN)/python -m benchmarks.store_io
	$(BIN)/python -m benchmarks.encode_speed
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.codecs
	$(BIN)/python -m benchmarks.closed_forms
	$(BIN)/python -m benchmarks.cosface
	$(BIN)/python -m benchmarks.analytic
	$(BIN)/python -m benchmarks.matching

prove: $(VENV)/.dev
	$(BIN)/python -m benchmarks.faults

# The report is tested in a real browser. Where none is installed and none may be, that test is skipped.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get update -qq; apt-get install -qq -y chromium >/dev/null; }; } || \
	  echo "Chromium is not installed: the browser test will be skipped."

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
