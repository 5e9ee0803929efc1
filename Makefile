# `make demo` and `make test` set up everything they need; `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# A file's tests stay together: they share fixtures, and one Ray. More files at once would fight for two cores.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# Dozens of processes import torch and Ray: without files of bytecode each compiles a thousand modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test faults check wheel clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/ready ## Make .venv with everything in it

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	touch .venv/ready

demo: setup ## Select 40 of 1,797 handwritten digits and compare with random draws
	$(BIN)/selective-ray demo

check: setup ## Lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: setup ## Run the tests (under 15 minutes on two cores)
	$(BIN)/python -m pytest $(TWO) -m "not faults"

faults: setup ## Kill every kind of process in every stage (under 45 minutes)
	$(BIN)/python -m pytest $(TWO) -m faults

wheel: setup ## Make the wheel that cluster.yaml installs on every machine
	rm -rf dist build
	$(BIN)/python -m uv build --quiet --wheel --python $(BIN)/python

clean: ## Remove what setup and demo made
	rm -rf .venv demo build dist *.egg-info
