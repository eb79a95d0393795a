PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-docs test-slurm lint docs docs-links

setup: $(VENV)/.installed

# torch first and by version: without one installed, pip would take the newest CUDA build.
$(VENV)/.installed: setup.cfg setup.py torchrec_amort/inference/native.cpp packaging/fbgemm-gpu-cpu/setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 ./packaging/fbgemm-gpu-cpu torchrec==1.8.0 torchx==0.7.0
	$(BIN)/pip install --quiet --editable '.[dev,docs]'
	$(BIN)/pip check
	touch $@

demo: setup
	$(BIN)/python examples/demo.py $(if $(SOURCE),--source $(SOURCE))

test: setup
	$(BIN)/python -m pytest

test-docs: setup
	$(BIN)/python -m pytest -m docs tests/docs

docs: setup
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going docs docs/_build/html
	@echo "the site is at docs/_build/html/index.html"

# Asks every site that a page links to. Not part of `docs` and `test-docs`, which need no network.
docs-links: setup
	$(BIN)/python -m sphinx --builder linkcheck docs docs/_build/links

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy torchrec_amort examples tests torchx_components

# On Debian, as root: two nodes of a real Slurm on this machine. Not part of `test`.
test-slurm: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/slurm/cluster.sh $(BIN)/python -m pytest tests/slurm/two_nodes.py
