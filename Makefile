# Each target does all of its own set-up: from nothing but python3 (3.11 or newer) with venv, pip and make.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# What the caller's shell has active must not reach into our environment.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

# One environment, one pip at a time, also under `make -j`.
.NOTPARALLEL:
.PHONY: help demo test test-slow lint types bench bench-quick bench-report machine-code docs clean

help:
	@echo "make demo       evaluate scikit-learn models on real data and compare with scikit-learn's metrics"
	@echo "make test       lint, types, tests and doctests"
	@echo "make test-slow  the tests that need minutes or many gigabytes"
	@echo "make bench      benchmarks beside NumPy, torch and JAX: twelve minutes, kept in benchmarks/results/"
	@echo "make bench-quick  some of them, in two minutes"
	@echo "make bench-report  docs/benchmarks.md, its plots and the README's figures from benchmarks/results/"
	@echo "make machine-code  docs/cuda-kernels.md: what the CUDA kernels compile to"
	@echo "make docs       the API reference as HTML, into docs/html"
	@echo "make lint       ruff alone        make types    mypy alone"
	@echo "make clean      remove the environment and everything built"
	@echo "Another Python:  make demo PYTHON=python3.12"

demo: $(VENV)/demo.stamp
	$(PY) examples/demo.py

# pytest comes last: its closing line is the run's.
test: lint types $(VENV)/test.stamp
	$(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup

test-slow: $(VENV)/test.stamp
	$(PY) -m pytest -m slow

lint: $(VENV)/lint.stamp
	$(PY) -m ruff check

types: $(VENV)/lint.stamp
	$(PY) -m mypy

bench: $(VENV)/bench.stamp
	$(PY) benchmarks/compare.py --save

bench-quick: $(VENV)/bench.stamp
	$(PY) benchmarks/compare.py --quick

bench-report: $(VENV)/bench.stamp
	$(PY) benchmarks/report.py

machine-code: $(VENV)/test.stamp
	$(PY) benchmarks/machine_code.py --write docs/cuda-kernels.md

docs: $(VENV)/docs.stamp
	$(PY) -m pdoc --docformat numpy --output-directory docs/html fastloss

clean:
	rm -rf $(VENV) build dist docs/html *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python.stamp:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: fastloss needs Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "fastloss needs Python 3.11 or newer, $(PYTHON) is `$(PYTHON) -V 2>&1`: make PYTHON=python3.12, say" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@touch $@

# NAME.stamp: fastloss in this checkout, with the extra NAME, is installed as setup.cfg now says.
$(VENV)/%.stamp: $(VENV)/python.stamp setup.cfg pyproject.toml
	@echo "installing fastloss[$*] into $(VENV): some minutes the first time"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
