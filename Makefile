# make demo   a video with AdaSpa beside the dense one, on the bundled model
# make test   the whole CPU test suite
# make lint   style, types and import rules
#
# Each makes the environment it needs. What can be set:
#   PYTHON=python3.12     which interpreter (3.10 or newer)
#   VENV=.venv            where the environment lies
#   TORCH="torch==2.13.0" what pip is asked for. On Linux, pip's own index has the CUDA build of torch (gigabytes); on a
#                         machine without a GPU add the index of CPU builds that torch's installation page names:
#                         make demo PIP_ARGS="--extra-index-url <that index>" TORCH="torch==2.13.0+cpu"
#   PIP_ARGS=...          further options of pip install
#   PROCESSES=2           how many processes run the tests; one takes up to 3 GB
#   PYTEST_ARGS=...       further options of pytest

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_ARGS ?=
CONSTRAINTS ?= .ci/constraints.txt
PROCESSES ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(PIP_ARGS)
SOURCES := pyproject.toml setup.py $(CONSTRAINTS)

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# threads that spin while they wait make small models several times slower on a machine that others use too
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@echo "running: patchkit run adaspa"
	@$(BIN)/patchkit run adaspa

test: $(VENV)/.test
	$(BIN)/pytest -n $(PROCESSES) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_installed.py --venv $(VENV)-installed

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.10 or newer" >&2; exit 1; }
	@echo "making the environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# torch first and alone: what else is installed must take this build, not bring another
$(VENV)/.torch: | $(BIN)/python
	@echo "installing $(TORCH)"
	@$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(SOURCES) | $(VENV)/.torch
	@echo "installing patchkit"
	@$(PIP) -e ".[video]"
	@touch $@

# CPU builds of torch come without triton, whose interpreter the kernel tests need; CUDA builds bring their own
$(VENV)/.test: $(SOURCES) | $(VENV)/.torch
	@echo "installing patchkit and what its tests need"
	@test "$$(uname -s)" != Linux || $(BIN)/python -c "import triton" 2>/dev/null || $(PIP) "triton==3.6.0"
	@$(PIP) -e ".[test]"
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(SOURCES) | $(VENV)/.test
	@echo "installing what the checks need"
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.test $(VENV)/.demo

clean:
	rm -rf $(VENV) $(VENV)-installed build dist out
