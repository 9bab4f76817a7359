# `make help` lists the targets. DEVICE=cpu or DEVICE=cuda overrides what set-up detects,
# PYTHON=/path/to/python3.11 names the interpreter, PYTEST_ARGS="-k name" goes to pytest,
# TEST_PROCESSES=1 runs the tests in one process instead of two, each taking whole files.
DEVICE ?= $(POLYSTILL_DEVICE)
PYTHON ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
BIN := .venv/bin
ANY_PYTHON := $(or $(shell command -v python3),$(shell command -v python3.11),$(PYTHON))

.PHONY: help setup unit test faults nodes quickstart real lint lock clean
.DEFAULT_GOAL := help

help: ## show this list; times are for two cores without a GPU
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

setup: ## make .venv from the lock file: two minutes; at once if nothing has changed
	@if [ -z "$(ANY_PYTHON)" ]; then echo "set-up: Python 3.11 is needed; install it." >&2; exit 1; fi
	@$(ANY_PYTHON) requirements/setup.py --device "$(DEVICE)" --python "$(PYTHON)"

unit: setup ## every unit test: three minutes
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile tests/unit $(PYTEST_ARGS)

test: setup ## the whole test suite, with real Ray, vLLM and DeepSpeed: half an hour
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

FAULTS := test_faults.py test_object_store.py test_vllm_teacher.py::test_poison_is_set_aside_though_it_kills_its_actor_each_time

faults: setup ## kill a scoring run 20 times, fill its disk, break its wire: 10 minutes and more
	$(BIN)/python -m pytest -m "not gpu" $(addprefix tests/integration/,$(FAULTS)) $(PYTEST_ARGS)

nodes: ## lose cables, heads and mounts of a cluster of namespaces: five minutes; needs root
	@if [ "$$(id -u)" != 0 ]; then echo "nodes: namespaces of the network need root: run it as root." >&2; exit 1; fi
	@if ! command -v ip >/dev/null; then echo "nodes: the command ip is missing: install iproute2." >&2; exit 1; fi
	@$(MAKE) --no-print-directory setup
	$(BIN)/python -m pytest -m nodes tests/nodes $(PYTEST_ARGS)

quickstart: setup ## distil two small teachers into one student: seven minutes
	$(BIN)/polystill run examples/quickstart/config.yaml

real: setup ## distil a real chat model of 135 M parameters, after a download of 93 MB: 15 minutes
	@$(BIN)/python examples/smollm2/fetch.py
	@$(BIN)/python examples/smollm2/make_models.py
	$(BIN)/polystill run examples/smollm2/config.yaml

lint: setup ## ruff, ruff format, pyright: one minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

lock: ## resolve requirements/cpu.lock and cuda.lock again; needs a network
	@if [ -z "$(ANY_PYTHON)" ]; then echo "set-up: Python 3.11 is needed; install it." >&2; exit 1; fi
	@$(ANY_PYTHON) requirements/setup.py --lock --python "$(PYTHON)"

clean: ## remove .venv and tool caches; runs and caches of results stay
	rm -rf .venv .setup.lock .pytest_cache .ruff_cache .hypothesis build polystill.egg-info
