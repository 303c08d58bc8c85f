# Everything runs in .venv, which each target makes for itself. On a bare machine one command is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test lint bench readme-table gpu-report clean

demo: $(INSTALLED)
	$(BIN)/bitfast demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is compared with, too, and measured beside it: about half an hour. OUT= names the folder, BENCH= more arguments.
OUT_BENCH = $(or $(OUT),build/bench)
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev,bench]"
	mkdir -p "$(OUT_BENCH)"
	$(BIN)/bitfast bench --threads 1 2 --output "$(OUT_BENCH)/report.json" \
		--markdown "$(OUT_BENCH)/report.md" --charts "$(OUT_BENCH)" $(BENCH)

# The tables of the README, from the JSON that it names.
readme-table: $(INSTALLED)
	$(BIN)/python -m bench.readme

# On a machine with a GPU, with what its own Python has: no virtual environment, nothing downloaded.
# ONLY="models_eager dispatch" runs those parts alone.
gpu-report:
	@test -n "$(OUT)" || { echo "usage: make gpu-report OUT=<folder>"; exit 2; }
	$(PYTHON) -m bench.gpu_report --build --output "$(OUT)" $(addprefix --only ,$(ONLY))

# torch comes first and the build shares it: an isolated build would download torch a second time.
# The pinned release is the newest that the tests ran on; TORCH= picks another. torchvision goes along with
# it, because the newest torchvision would bring the newest torch.
TORCH ?= torch==2.13.0
$(INSTALLED): $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)" torchvision
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info bitfast/*.so
