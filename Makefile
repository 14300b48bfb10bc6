# `make demo` and `make test` need only Python >= 3.11, git and make: each sets up $(VENV) first, once.
#   PYTHON=python3.12   an interpreter of your choice; otherwise the first of CANDIDATES that works
#   VENV=.venv          where the virtual environment lies
VENV ?= .venv
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_FLAGS ?=

# One marker a choice of interpreter: another choice makes the environment anew, none keeps the one that is there.
THERE := $(firstword $(wildcard $(VENV)/.made-by-*))
MADE := $(or $(if $(PYTHON),$(VENV)/.made-by-$(subst /,_,$(PYTHON))),$(THERE),$(VENV)/.made-by-choice)
INSTALLED := $(VENV)/.installed
INSTALLED_GPU := $(VENV)/.installed-gpu

# Pinned versions of the Python in use; of the newest older one where there are none.
CONSTRAINTS = $$(n=$$($(BIN)/python -c 'import sys; print(sys.version_info.minor)'); \
  while ! test -f constraints/py3$$n.txt; do n=$$((n - 1)); test $$n -gt 10 || exit 1; done; echo constraints/py3$$n.txt)

# What the notebooks show is a function of these; a rendered copy that is older than one of them is made anew.
READ := $(shell find pallas_kernels sparse_serve_jax models/reference experiments/results -type f -not -name '*.pyc')
RENDERED := $(patsubst notebooks/%.ipynb,docs/notebooks/%.md,$(wildcard notebooks/*.ipynb))

.PHONY: help demo gpu test soak test-gpu notebooks docs lint format constraints clean
help:
	@echo 'make demo         the rungs of the ladder side by side on the reference model'
	@echo 'make gpu          the environment for an NVIDIA GPU: adds CUDA to $(VENV)'
	@echo 'make test         ruff, pyright and every test that needs no GPU'
	@echo 'make soak         thousands of requests while devices fail, and mutations: some minutes'
	@echo 'make test-gpu     the tests that need an NVIDIA GPU'
	@echo 'make notebooks    runs what changed of notebooks/ and writes it with its plots to docs/notebooks'
	@echo 'make docs         that, tables, pictures and the site of docs/, in build/site; fails on a broken link'
	@echo 'make format       lays out the code as `make test` wants it'
	@echo 'make constraints  renews the pinned versions: PYTHON=python3.12 [JAX=0.11.2]'
	@echo 'make clean        removes the virtual environment and caches'

demo: $(INSTALLED)
	@echo 'Serving four times, which takes some minutes on a CPU: python -m experiments.demo'
	@$(BIN)/python -m experiments.demo

gpu: $(INSTALLED_GPU)

test: lint
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m 'not gpu and not soak' $(PYTEST_FLAGS) tests

soak: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m 'soak and not gpu' $(PYTEST_FLAGS) tests

test-gpu: $(INSTALLED_GPU)
	$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS) tests

notebooks: $(RENDERED)

docs/notebooks/%.md: notebooks/%.ipynb tools/render_notebooks.py $(READ) | $(INSTALLED)
	$(BIN)/python tools/render_notebooks.py docs/notebooks $<

docs: $(INSTALLED) notebooks
	@$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	$(BIN)/python tools/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(MADE):
	@echo 'Making $(VENV), a virtual environment'
	@clear=; for made in $(VENV)/.made-by-*; do if test -e "$$made"; then clear=--clear; fi; done; \
	for python in $(CANDIDATES); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  $$python -m venv $$clear $(VENV) >/dev/null 2>&1 && $(BIN)/python -m pip --version >/dev/null 2>&1 || continue; \
	  echo "$(VENV): $$python, $$($(BIN)/python --version)"; touch $@; exit 0; \
	done; \
	echo 'No Python >= 3.11 that can make a virtual environment with pip among: $(CANDIDATES)' >&2; exit 1

$(INSTALLED): $(MADE) pyproject.toml $(wildcard constraints/*.txt)
	@echo "Installing the packages of $(CONSTRAINTS) there: some minutes, once. What pip says follows"
	@$(PIP) install --constraint $(CONSTRAINTS) --editable '.[dev,eval]'
	@touch $@

$(INSTALLED_GPU): $(INSTALLED)
	@echo 'Adding CUDA: some GB'
	@$(PIP) install --constraint $(CONSTRAINTS) --editable '.[gpu]'
	@touch $@

# Everything that `.[dev,eval]` brings, at its newest, as names and versions. Run `make test` afterwards.
constraints:
	@rm -rf build/constraints
	@$(or $(PYTHON),python3) -m venv build/constraints
	@build/constraints/bin/python -m pip --disable-pip-version-check --quiet install '.[dev,eval]' $(JAX:%=jax==%)
	@file=constraints/py3$$(build/constraints/bin/python -c 'import sys; print(sys.version_info.minor)').txt; \
	build/constraints/bin/python -m pip freeze --exclude sparse-serve-jax 2>/dev/null | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > $$file; \
	echo "$$file: $$(grep -c == $$file) packages, $$(grep ^jax== $$file)"

clean:
	@for made in $(VENV)/.made-by-*; do if test -e "$$made"; then rm -rf $(VENV); fi; done
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
