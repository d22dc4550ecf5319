# make demo    the main job on a throwaway PostgreSQL
# make test    all tests, with branch coverage
# make check   ruff, mypy, pyright, import-linter
#
# Each makes .venv first where it is missing or older than its inputs. PYTHON=python3.12 names another interpreter.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format clean

demo: .venv/installed
	@$(BIN)/python -m iot_models.demo

test: .venv/installed
	@rm -rf .coverage
	$(BIN)/coverage run -m pytest
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .coverage dist

# constraints.txt holds the versions that this was last seen green with; a user's installation is not bound by it.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "iot_models needs Python 3.11 or newer, $(PYTHON) is older: try make PYTHON=python3.12"; exit 1; }
	@echo "Installing into .venv, once; this takes about half a minute."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
