# `make quickstart` and `make test` create the virtual environment that they need. `make help` lists all targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One test process per core, at most four; each test file runs in one process.
PYTEST := -m pytest -n logical --maxprocesses 4 --dist loadfile
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The oldest transformers that pyproject.toml accepts, with a huggingface_hub of the same time.
OLDEST := .venv-oldest
OLDEST_VERSIONS := s/^transformers==.*/transformers==5.17.0/; s/^huggingface_hub==.*/huggingface_hub==1.33.0/

.PHONY: help quickstart test test-all test-oldest conformance gpu check docs build clean

help:
	@echo "quickstart    train a small GPT on the source of the Python standard library and generate from it"
	@echo "test          lint, types, import levels, then the tests"
	@echo "test-all      the same with the slow tests"
	@echo "test-oldest   all tests with the oldest supported transformers"
	@echo "conformance   the common model tests of transformers on this package's classes"
	@echo "gpu           measure and test on this machine's GPU, in about ten minutes"
	@echo "check         lint, types and import levels"
	@echo "docs          build the documentation into site/, without network access"
	@echo "build         build the source distribution and the wheel into dist/"
	@echo "clean         remove environments, caches and build results"

quickstart: $(VENV)/.runtime
	$(BIN)/python examples/pretrain.py --config examples/configs/quickstart.yaml --resume
	$(BIN)/gpt-kit generate runs/quickstart --prompt "    def __init__(self" --max_new_tokens 200

test: $(VENV)/.test check
	$(BIN)/python $(PYTEST)

test-all: $(VENV)/.test check
	$(BIN)/python $(PYTEST) -m "slow or not slow"

# The common model tests of transformers, taken from its source distribution, on this package's classes.
conformance: $(VENV)/.test
	$(BIN)/python -m pytest -m slow tests/conformance

# What only a GPU can show; torch must be one with CUDA.
gpu: $(VENV)/.test
	$(BIN)/python benchmarks/gpu.py

# All tests with the oldest supported transformers and the same torch.
test-oldest: $(OLDEST)/.test
	$(OLDEST)/bin/python $(PYTEST) -m "slow or not slow"

# Lint, types and import levels, without the tests.
check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The warnings of mkdocs are errors: broken links, pages outside of the navigation, unknown API names.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/.build
	$(BIN)/python -m build

# Stamp files: a package is installed again only when pyproject.toml or constraints.txt changes.
$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[plot,track]"
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(INSTALL) -e ".[test]"
	touch $@

$(VENV)/.docs: $(VENV)/.runtime
	$(INSTALL) -e ".[docs]"
	touch $@

$(VENV)/.build: $(VENV)/.runtime
	$(INSTALL) build
	touch $@

$(OLDEST)/.test: pyproject.toml constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed '$(OLDEST_VERSIONS)' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
