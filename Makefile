# make demo | test | test-all | check | docs: each sets up what it needs, from Python 3.10+ with pip alone.
SYSTEM_PYTHON := $(shell command -v python3.11 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

# One thread per process: tests and examples run several processes on few cores.
export OMP_NUM_THREADS := 1

# Tests of several processes and of what the pages show, and all others: they run side by side, on two cores.
PROCESSES := tests/loops tests/chaos $(wildcard tests/test_hook.py tests/test_run.py tests/test_numbers.py \
	tests/test_loops*.py tests/test_strategy.py tests/test_docs.py tests/test_cli.py tests/test_port.py \
	tests/test_fault.py tests/test_collectives.py tests/test_integrations_*.py tests/test_examples_*.py)

.PHONY: demo test test-processes test-others test-all check docs format clean

# The editable install lists the package's files, so a file that comes or goes (it touches its folder) renews it.
FOLDERS := $(shell find torch_qgc -type d -not -name __pycache__)

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(FOLDERS) $(wildcard torch_qgc/kernels/*.cpp torch_qgc/kernels/*.h)
	test -x $(PYTHON) || $(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(PYTHON) examples/detection_mobilenetv3.py

test: $(READY)
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-processes test-others

test-processes: $(READY)
	$(PYTHON) -m pytest $(PROCESSES)

test-others: $(READY)
	$(PYTHON) -m pytest $(addprefix --ignore=,$(PROCESSES))

test-all: $(READY)
	$(PYTHON) -m pytest -m 'not gpu' --hypothesis-profile=explore

check: $(READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --site-dir build/site

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs serve

format: $(READY)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

clean:
	rm -rf $(VENV) build data demo
