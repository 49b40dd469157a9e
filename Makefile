# Everything runs in .venv, which is made on first use. Needs git, make and Python 3.11 (PYTHON=... for another one).
PYTHON ?= python3
BIN := .venv/bin
# Tests run in so many processes, of one thread each. More than there are cores makes nothing faster.
JOBS ?= auto
INSTALLED := .venv/.installed

.PHONY: demo test test-slow check format bench bench-gpu docs clean

demo: $(INSTALLED)
	$(BIN)/python examples/skills/demo.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

check: $(INSTALLED)
	$(BIN)/ruff format --check src tests benchmarks examples docs peft-shim
	$(BIN)/ruff check src tests benchmarks examples docs peft-shim
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format src tests benchmarks examples docs peft-shim
	$(BIN)/ruff check --fix src tests benchmarks examples docs peft-shim

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# On a machine with a CUDA GPU, whose own Python has torch and the rest: nothing is installed. BENCH=--dry runs it on a CPU.
bench-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu $(BENCH)

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cli,transformers,dev]"
	touch $(INSTALLED)

clean:
	rm -rf .venv
