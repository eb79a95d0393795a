PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch, and what was built for it.
TORCH := 2.13.0
TORCHREC := 1.8.0
FBGEMM := 1.8.0
# Where torch alone is taken from; README tells what each choice downloads.
TORCH_INDEX ?=
# Where `test-versions` keeps its environments.
VENVS := .venvs

.PHONY: setup demo test test-docs test-slurm test-install test-spark test-versions lint docs docs-links

setup: $(VENV)/.installed

# torch first, by version and from its own index: whatever asks for torch later is content with it. The operators are
# built for it: without build isolation, since pip would isolate the build from it.
$(VENV)/.installed: setup.cfg setup.py pyproject.toml packaging/fbgemm-gpu-cpu/setup.py \
		$(wildcard torchrec_amort/ops/*.cpp torchrec_amort/ops/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	FBGEMM=$(FBGEMM) $(BIN)/pip install --quiet ./packaging/fbgemm-gpu-cpu torchrec==$(TORCHREC)
	$(BIN)/pip install --quiet 'setuptools>=77'
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev,docs]'
	$(BIN)/pip check
	touch $@

demo: setup
	$(BIN)/python examples/demo.py $(if $(SOURCE),--source $(SOURCE))

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-docs: setup
	$(BIN)/python -m pytest --numprocesses 2 --maxschedchunk 1 -m docs tests/docs

docs: setup
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going docs docs/_build/html
	@echo "the site is at docs/_build/html/index.html"

# Asks every site that a page links to. Not part of `docs` and `test-docs`, which need no network.
docs-links: setup
	$(BIN)/python -m sphinx --builder linkcheck docs docs/_build/links

# Builds a wheel, and installs it, and the source without torch or a compiler, where no extra is; some minutes.
test-install: setup
	$(BIN)/python -m pytest -m slow tests/test_install.py

# The same rows by Apache Spark, on a cluster of one master and two workers on this host. Needs Java 17; a download of
# 450 MB, and some minutes.
test-spark: setup
	$(BIN)/pip install --quiet --editable '.[spark]' --no-build-isolation
	tests/spark/cluster.sh $(BIN)/python $(BIN)/python -m pytest -m spark tests/data/test_builder_spark.py

# The tests with each minor version of torch once and each Python once; an hour or two, and 20 GB of CUDA builds
# unless TORCH_INDEX is given. Needs python3.10 to python3.13 on the path.
test-versions:
	$(PYTHON) packaging/test_versions.py --venvs $(VENVS) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy torchrec_amort examples tests torchx_components packaging/test_versions.py

# On Debian, as root: two nodes of a real Slurm on this machine. Not part of `test`.
test-slurm: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/slurm/cluster.sh $(BIN)/python -m pytest tests/slurm/two_nodes.py
