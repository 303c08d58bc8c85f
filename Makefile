# Everything runs in .venv, which each target makes for itself. On a bare machine one command is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
NEXT := .venv-transformers5
TESTS_OF_NEXT := tests/test_in_place.py tests/test_in_place_report.py tests/test_auto_classes.py \
	tests/test_transformers_classes.py tests/test_trainer.py tests/test_adapters.py
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test lint bench readme-table gpu-report clean

demo: $(INSTALLED)
	$(BIN)/bitfast demo

# The tests of what is done to models of transformers run with its versions 4.56 and 5. Processes take
# test after test, and files whose tests share a fixture as a whole (tests/conftest.py).
# Threads that wait must not spin, or the processes would keep each other from working. Many tests start processes,
# which would compile all modules anew where bytecode is not written.
# The random numbers are the same in every run. A nightly run uses SEED=random: new ones, whose seed is printed;
# SEED=<that number> draws them again.
JOBS ?= 2
SEED ?=
PYTEST := -m pytest -n $(JOBS)
test: export OMP_WAIT_POLICY = passive
test: export PYTHONDONTWRITEBYTECODE =
test: export BITFAST_TEST_SEED = $(SEED)
test: $(INSTALLED) $(NEXT)/installed
	$(BIN)/python $(PYTEST)
	$(NEXT)/bin/python $(PYTEST) $(TESTS_OF_NEXT)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is compared with, too, and measured beside it: about half an hour. OUT= names the folder, BENCH= more arguments.
OUT_BENCH = $(or $(OUT),build/bench)
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev,bench]"
	mkdir -p "$(OUT_BENCH)"
	$(BIN)/bitfast bench --device cpu --threads 1 2 --output "$(OUT_BENCH)/report.json" \
		--markdown "$(OUT_BENCH)/report.md" --charts "$(OUT_BENCH)" $(BENCH)

# The tables of docs/performance.md, from the JSON that it names.
readme-table: $(INSTALLED)
	$(BIN)/python -m bench.readme

# On a machine with a GPU, with what its own Python has: no virtual environment, nothing downloaded.
# ONLY="bench tests" runs those steps alone; the script says which there are.
gpu-report:
	@test -n "$(OUT)" || { echo "usage: make gpu-report OUT=<folder>"; exit 2; }
	PYTHON="$(PYTHON)" ONLY="$(ONLY)" bench/gpu_report.sh "$(OUT)"

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

# What transformers 5 needs lies here; all the rest, torch above all, is that of the first environment.
$(NEXT)/installed: $(INSTALLED)
	test -d $(NEXT) || $(BIN)/python -m venv $(NEXT)
	shared="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
		echo "import site; site.addsitedir('$$shared')" \
		> "$$($(NEXT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	$(NEXT)/bin/python -m pip install --quiet "transformers>=5.24,<6"
	touch $(NEXT)/installed

clean:
	rm -rf $(VENV) $(NEXT) build dist *.egg-info bitfast/*.so
