# Two commands set up everything: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A process for each core, at most four; each runs whole files of tests.
PYTEST := -m pytest -n logical --maxprocesses 4 --dist loadfile
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The oldest transformers that pyproject.toml accepts, and the hub client of its time.
OLDEST := .venv-oldest
OLDEST_VERSIONS := s/^transformers==.*/transformers==5.17.0/; s/^huggingface_hub==.*/huggingface_hub==1.33.0/

.PHONY: quickstart test test-all test-oldest conformance check clean

quickstart: $(VENV)/.runtime
	$(BIN)/python examples/pretrain.py --config examples/configs/quickstart.yaml --resume
	$(BIN)/gpt-kit generate runs/quickstart --prompt "    def __init__(self" --max_new_tokens 200

test: $(VENV)/.test check
	$(BIN)/python $(PYTEST)

test-all: $(VENV)/.test check
	$(BIN)/python $(PYTEST) -m "slow or not slow"

# transformers' own common model tests on this package's classes, from its source distribution.
conformance: $(VENV)/.test
	$(BIN)/python -m pytest -m slow tests/conformance

# Everything once more on the oldest transformers, with the same torch.
test-oldest: $(OLDEST)/.test
	$(OLDEST)/bin/python $(PYTEST) -m "slow or not slow"

# Lint, types and the one-way imports, without the tests.
check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The stamps make a second run start at once: nothing is installed again until these files change.
$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[plot,track]"
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(INSTALL) -e ".[test]"
	touch $@

$(OLDEST)/.test: pyproject.toml constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed '$(OLDEST_VERSIONS)' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
