# Two commands set up everything: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test test-all check clean

quickstart: $(VENV)/.runtime
	$(BIN)/python examples/train_gpt.py --config examples/configs/quickstart.yaml --resume
	$(BIN)/gpt-kit generate runs/quickstart --prompt "    def __init__(self" --max_new_tokens 200

test: $(VENV)/.test check
	$(BIN)/python -m pytest

test-all: $(VENV)/.test check
	$(BIN)/python -m pytest -m "slow or not slow"

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

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
