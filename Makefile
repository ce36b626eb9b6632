# `make` lists the targets. Each works from a fresh clone and creates .venv when it is missing.

# Installed before everything else, so that no other package pulls a newer one. Empty leaves the choice to pip.
# Pip's flags may follow the name: where pip finds a CUDA build under it, --index-url names an index of CPU builds.
TORCH ?= torch==2.13.0
PYTHON ?= python3
EXTRAS ?= trainer,eval,colossal,dev
# Frameworks that the tests run against, without their dependencies: they ask for torchvision, whose wheel on
# PyPI is made for a CUDA build of torch; the tests stand in for it.
HOSTS := imagen-pytorch==2.1.0

# Without its dependencies: it pins versions of torch, transformers and diffusers that are years old, and runs
# correctly on current ones. The extra `colossal` lists what it needs at run time.
COLOSSAL := colossalai==0.5.0

DEMO_CONFIG := configs/image/digits/speedit.yaml
DEMO_DIR ?= outputs/digits/speedit
SMOKE_DIR := outputs/smoke
SMOKE_TRAIN := max_training_steps=20 log_every=10 sample_every=0
SMOKE_SAMPLE := sampler.num_steps=5

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PIP_INSTALL := $(PIP) install $(if $(CI),--progress-bar off)
# The 95 % fence stands in pyproject.toml.
PYTEST := $(BIN)/python -m pytest --cov --cov-report=term

# Small tensors gain little from a second thread, and two threads wait for each other on a busy machine.
demo smoke check test: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help install demo lint format types smoke check test clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed  ## create .venv with the package (editable), the trainer and the tools

# Touched last, so that an interrupted installation is taken up again.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(if $(strip $(TORCH)),$(PIP_INSTALL) $(TORCH))
	$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	$(if $(findstring dev,$(EXTRAS)),$(PIP_INSTALL) --no-deps $(HOSTS))
	$(if $(findstring colossal,$(EXTRAS)),$(PIP_INSTALL) --no-deps $(COLOSSAL))
	@touch $@

# The last command ends by listing where the samples, the loss curve, the metrics and the checkpoint lie.
demo: install  ## train a small model on real digits, draw samples, say where everything lies
	$(BIN)/python tools/main.py -c $(DEMO_CONFIG) -p train experiment_dir=$(DEMO_DIR)
	$(BIN)/python tools/main.py -c $(DEMO_CONFIG) -p sample experiment_dir=$(DEMO_DIR)

lint: install  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## rewrite files in the house format and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## mypy, strict for core, registry, diffusion and hosts
	$(BIN)/mypy

smoke: install  ## the main job at its smallest: 20 training steps and a sample grid
	rm -rf $(SMOKE_DIR)
	$(BIN)/speedit -c $(DEMO_CONFIG) -p train experiment_dir=$(SMOKE_DIR) $(SMOKE_TRAIN)
	$(BIN)/speedit -c $(DEMO_CONFIG) -p sample experiment_dir=$(SMOKE_DIR) $(SMOKE_SAMPLE)
	test -s $(SMOKE_DIR)/samples.png -a -s $(SMOKE_DIR)/metrics.jsonl

check: lint types smoke  ## everything but the slow tests
	$(PYTEST) -m 'not slow'

test: lint types smoke  ## the whole check, as CI runs it
	$(PYTEST)

clean:  ## remove caches and builds; .venv and trained models in outputs/ stay
	rm -rf build dist $(SMOKE_DIR) *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
