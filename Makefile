# coinfer. `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -o errexit -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH_INDEX ?= $(KEPT_INDEX)
DATA ?=
WEIGHTS ?=
NAME ?=
BUNDLE ?=
SOURCE ?=

ROOT := $(CURDIR)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# where torch came from last time, so that `make repro` after `make install TORCH_INDEX=...` does not fetch the other one
KEPT_INDEX := $(shell cat $(VENV)/.torch-index 2>/dev/null)

# stage commands in dvc.yaml say plain `python`
export PATH := $(ROOT)/$(BIN):$(PATH)
# nothing here reports home
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# each stage is a process: without bytecode it would compile torch and mlflow again, some 20 s
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install repro test lint ui cifar10 bench arm readme requirements clean

help:  ## list the targets
	@grep -hE '^[a-z0-9]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*  ## (.*)/\1|\2/' | awk -F'|' '{ printf "  make %-13s%s\n", $$1, $$2 }'

install: $(STAMP)  ## make .venv with the pinned requirements; TORCH_INDEX=URL takes torch from an index of CPU wheels

# uv installs in a minute what takes pip several; the last line builds the C coder
$(STAMP): requirements.txt pyproject.toml $(wildcard setup.py pipeline/runtime/*.c)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "coinfer needs Python 3.11 or newer; name one with PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
ifeq ($(TORCH_INDEX),)
	VIRTUAL_ENV=$(ROOT)/$(VENV) $(BIN)/uv pip install --quiet -r requirements.txt
else
	grep -E '^torch(vision)?==' requirements.txt | VIRTUAL_ENV=$(ROOT)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --reinstall --index-url $(TORCH_INDEX) -r -
	grep -vE '^(cuda|nvidia|triton)' requirements.txt | VIRTUAL_ENV=$(ROOT)/$(VENV) $(BIN)/uv pip install --quiet -r -
endif
	VIRTUAL_ENV=$(ROOT)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@echo '$(TORCH_INDEX)' > $(VENV)/.torch-index
	@touch $@

ifneq ($(TORCH_INDEX),$(KEPT_INDEX))
$(STAMP): FORCE
endif
FORCE:

repro: $(STAMP)  ## run the pipeline on the digits and print what it chose and what it costs
	@$(BIN)/dvc repro
	@$(BIN)/python -m pipeline.cli report

test: $(STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

lint: $(STAMP)  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: $(STAMP)  ## open the runs in MLflow
	$(BIN)/mlflow ui --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}

cifar10: $(STAMP)  ## run the pipeline on CIFAR-10; DATA=ARCHIVE or DATA=FOLDER is an image folder; WEIGHTS=FILE or FOLDER to start from
ifneq ($(DATA),)
	@test -e '$(DATA)' || { echo "DATA=$(DATA) does not exist; give an archive or a folder that holds train/CLASS/* and test/CLASS/*."; exit 1; }
	@case "$$(realpath '$(DATA)')/" in "$$(realpath examples/cifar10)"/data/*) \
		echo "DATA=$(DATA) is where the images go; leave DATA out to use those that are there."; exit 1;; esac
	@rm -rf examples/cifar10/data.tmp
	@if test -d '$(DATA)'; then ln -s "$$(realpath '$(DATA)')" examples/cifar10/data.tmp; \
	else mkdir examples/cifar10/data.tmp && tar -xf '$(DATA)' -C examples/cifar10/data.tmp; fi
	@rm -rf examples/cifar10/data && mv examples/cifar10/data.tmp examples/cifar10/data
endif
	@mkdir -p examples/cifar10/data
ifneq ($(WEIGHTS),)
	@test -e '$(WEIGHTS)' || { echo "WEIGHTS=$(WEIGHTS) does not exist; give a safetensors file or a folder of them."; exit 1; }
	@find -L '$(WEIGHTS)' -maxdepth 1 -name '*.safetensors' | { taken=; while read -r file; do name=$$(basename "$$file"); \
		grep -qF "weights/$$name" examples/cifar10/params.yaml || continue; taken=1; \
		test "$$file" -ef "examples/cifar10/weights/$$name" || cp "$$file" examples/cifar10/weights/ || exit 1; done; \
		test "$$taken" || { echo "examples/cifar10/params.yaml names no weights of $(WEIGHTS); set backbone.weights there to weights/NAME.safetensors."; exit 1; }; }
endif
	@uri="$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"; [[ "$$uri" == sqlite:///[!/]* ]] && uri="sqlite:///$(ROOT)/$${uri#sqlite:///}"; \
		export MLFLOW_TRACKING_URI="$$uri"; cd examples/cifar10 && dvc repro && python -m pipeline.cli report

bench: $(STAMP)  ## run benchmarks/NAME.py, which writes results/NAME.json
	@grep -qs __main__ 'benchmarks/$(NAME).py' || { echo "give NAME, one of: $(filter-out readme,$(basename $(notdir $(shell grep -l __main__ benchmarks/*.py))))"; exit 1; }
	$(BIN)/python benchmarks/$(NAME).py

arm: $(STAMP)  ## does a device on 64-bit Arm, emulated, predict what one does here? BUNDLE=FOLDER and SOURCE=FOLDER name other ones to try
	@$(BIN)/python tools/arm64.py $(if $(BUNDLE),--bundle '$(BUNDLE)') $(if $(SOURCE),--source '$(SOURCE)')

readme: $(STAMP)  ## make README's tables and pictures from results/*.json
	$(BIN)/python benchmarks/readme.py

requirements: $(STAMP)  ## pin the newest releases that pyproject.toml allows
	$(BIN)/uv pip compile pyproject.toml --upgrade --extra train --extra dev --universal --python-version 3.11 --no-annotate \
		--no-emit-index-url --no-emit-find-links --custom-compile-command 'make requirements' --quiet -o requirements.txt

clean:  ## delete caches and built files; .venv, artifacts and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find benchmarks models pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
