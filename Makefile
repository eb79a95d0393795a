PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slurm lint

setup: $(VENV)/.installed

# torch first and by version: without one installed, pip would take the newest CUDA build.
$(VENV)/.installed: setup.cfg setup.py torchrec_amort/inference/native.cpp packaging/fbgemm-gpu-cpu/setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 ./packaging/fbgemm-gpu-cpu torchrec==1.8.0 torchx==0.7.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip check
	touch $@

demo: setup
	$(BIN)/python examples/demo.py $(if $(SOURCE),--source $(SOURCE))

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy torchrec_amort examples tests torchx_components

# On Debian, as root: two nodes of a real Slurm on this machine. Not part of `test`.
test-slurm: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/slurm/cluster.sh $(BIN)/python -m pytest tests/slurm/two_nodes.py
