PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p && break; done)
BIN := .venv/bin

.PHONY: setup demo test bench lint parity clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) scripts/make_venv.py .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

demo: setup
	$(BIN)/reeltune demo

test: setup
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m benchmarks

parity: setup
	$(BIN)/python -m benchmarks.parity --write docs/parity.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
