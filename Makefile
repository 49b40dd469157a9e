# Everything runs in .venv, which is made on first use. Needs git, make and Python 3.11 (PYTHON=... for another one).
PYTHON ?= python3
BIN := .venv/bin
# Tests run in so many processes, of one thread each. More than there are cores makes nothing faster.
JOBS ?= auto
INSTALLED := .venv/.installed
WITH_DOCS := .venv/.installed-docs
WITH_SERVE := .venv/.installed-serve

# The oldest Python and packages that are promised, in a folder of their own. On Linux this torch brings 3 GB of CUDA along.
OLDEST_PYTHON ?= python3.10
OLDEST := .venv-oldest
# Which tests to run with them: all that are not slow.
OLDEST_TESTS ?= tests

.PHONY: demo test test-slow test-oldest mutants check format bench bench-gpu fleet-plots docs pictures site clean

demo: $(INSTALLED)
	$(BIN)/python examples/skills/demo.py

# Of the tests of other libraries a file goes to one process: what the reference did is asked once for each file.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ecosystem -n $(JOBS) --dist loadfile -m "not slow"

test-slow: $(WITH_SERVE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ecosystem -n $(JOBS) --dist loadfile -m slow

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" -W ignore $(OLDEST_TESTS)

# Takes hours: one line of a sample is changed at a time, and the tests that are concerned are run. Goes on where it stopped.
mutants: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(MUTANTS)

check: $(INSTALLED)
	$(BIN)/ruff format --check src tests benchmarks examples docs peft-shim
	$(BIN)/ruff check src tests benchmarks examples docs peft-shim
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format src tests benchmarks examples docs peft-shim
	$(BIN)/ruff check --fix src tests benchmarks examples docs peft-shim

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# What benchmarks/README.md says of a thousand adapters, with its pictures. Takes some minutes, best with nothing else running.
fleet-plots: $(INSTALLED)
	$(BIN)/python -m benchmarks --only fleet --plots

# On a machine with a CUDA GPU, whose own Python has torch and the rest: nothing is installed. BENCH=--dry runs it on a CPU.
bench-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu $(BENCH)

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

# Of real runs of the program: where a test says that a picture is out of date.
pictures: $(INSTALLED)
	$(BIN)/python docs/pictures.py

# Into site/; `python3 -m http.server -d site` shows it. The variable silences an advertisement.
site: $(WITH_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cli,plots,gguf,transformers,ecosystem,quant,dev]"
	touch $(INSTALLED)

$(WITH_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $(WITH_DOCS)

# Ray is large, and nothing else needs it.
$(WITH_SERVE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[serve]"
	touch $(WITH_SERVE)

$(OLDEST)/.installed: pyproject.toml tests/oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(OLDEST)/.installed

clean:
	rm -rf .venv $(OLDEST) site
