# make demo    the main job on a throwaway PostgreSQL
# make quick   after each change: the tests of the service and of the pure functions, its core covered whole
# make test    all tests in parallel, with branch coverage of all code
# make test-matrix   the migration and service tests on PostgreSQL 15 to 18, and with the oldest libraries admitted
# make test-distributed   the migrations and the service on a Citus cluster, which IOT_MODELS_TEST_DISTRIBUTED_URL names;
#              prints where calls of the service differ from those on a plain table
# make bench   how fast it is, beside the limit and beside what one would write instead; writes benchmarks/results.md
# make bench-stall   how long a migration keeps a writer waiting; writes benchmarks/stall.md
# make soak    load with faults for half an hour (MINUTES=30), then proof that nothing was lost; then a fleet behind the MQTT bridge
# make fuzz    hostile input for ten minutes (MINUTES=10), then histories of objects for as long
# make breaks  breaks the code in the ways that would break a promise; a test has to notice each
# make revision   adds a revision and a column to a copy of the checkout; no test fails but what is about the history
# make check   ruff, mypy, pyright, import-linter, and squawk on the migrations' SQL
#
# Which test is where, and how to add one: tests/README.md. Each makes .venv first where it is missing or older than its inputs. PYTHON=python3.12 names another interpreter.

PYTHON ?= python3
BIN := .venv/bin

# What `make quick` covers at 100 %, lines and branches: not what _core holds for engines, tenancy and migrations, which have
# tests of their own.
CORE := iot_models/models.py,iot_models/service.py,iot_models/reports.py,iot_models/shadow.py,iot_models/twin.py,iot_models/errors.py,iot_models/_core/*
ELSEWHERE := iot_models/_core/asyncpg_options.py,iot_models/_core/database_errors.py,iot_models/_core/server_settings.py,iot_models/_core/shown_names.py,iot_models/_core/ways_around.py

# One more than there are cores, because a test often waits for the server.
WORKERS = $(shell $(BIN)/python -c 'import os; print(min(4, os.cpu_count() + 1))')
PARALLEL = --numprocesses=$(WORKERS) --dist=worksteal

# Where an environment forbids it, each worker and each command that a test runs would compile all modules anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo quick test test-matrix test-distributed check lint-sql bench bench-stall soak fuzz breaks revision format clean

demo: .venv/installed
	@$(BIN)/python examples/demo.py

quick: export COVERAGE_FILE := .coverage/quick
quick: .venv/installed
	@rm -f .coverage/quick*
	$(BIN)/coverage run -m pytest --quiet $(PARALLEL) --hypothesis-profile=quick -m 'not large' tests/unit tests/service tests/bus/test_notify.py
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include='$(CORE)' --omit='$(ELSEWHERE)'

test: .venv/installed
	@rm -rf .coverage
	$(BIN)/coverage run -m pytest $(PARALLEL)
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-matrix: .venv/installed
	@$(BIN)/python .ci/matrix.py

# No package has Citus, so the cluster is yours. The tests make schemas of their own in the database, and drop them.
test-distributed: .venv/installed
	@test -n "$$IOT_MODELS_TEST_DISTRIBUTED_URL" || { \
	  echo "test-distributed needs a Citus cluster: set IOT_MODELS_TEST_DISTRIBUTED_URL to the URL of a database on its"; \
	  echo "coordinator, with the extension, two workers and a superuser"; exit 1; }
	$(BIN)/python -m pytest --capture=no tests/distributed

bench: .venv/bench
	@$(BIN)/python benchmarks/bench.py

bench-stall: .venv/installed
	@$(BIN)/python benchmarks/stall.py --report benchmarks/stall.md

soak: .venv/installed
	@$(BIN)/python -m tests.guarantees.soak --minutes $(or $(MINUTES),30)
	@$(BIN)/python -m tests.guarantees.soak_bridge --minutes $(or $(MINUTES),30)

fuzz: .venv/installed
	@$(BIN)/python -m tests.fuzz.fuzz --minutes $(or $(MINUTES),10)
	@$(BIN)/python -m tests.fuzz.histories --minutes $(or $(MINUTES),10)

breaks: .venv/installed
	@$(BIN)/python .ci/breaks.py

revision: .venv/installed
	@$(BIN)/python .ci/new_revision.py

check: .venv/installed lint-sql
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

# What the migrations print for psql, each step up and down.
lint-sql: .venv/installed
	@$(BIN)/python .ci/lint_sql.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-matrix .coverage dist

# constraints.txt holds the versions that this was last seen green with; a user's installation is not bound by it.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "iot_models needs Python 3.11 or newer, $(PYTHON) is older: try make PYTHON=python3.12"; exit 1; }
	@echo "Installing into .venv, once; this takes about half a minute."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# What only the benchmarks need: the libraries that they compare with, and matplotlib.
.venv/bench: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@touch $@
