# One command each; `make` alone lists them. Needs Python 3.11 or newer, pip and make; uses uv where it is on PATH.
# PYTHON=... names the Python that makes .venv, VENV=... another environment, ARGS=... is handed to pytest, WORKERS=... run tests.

VENV ?= .venv
PYTHON ?=
ARGS ?=
WORKERS ?= 2
RUN = $(VENV)/bin/python
export PYTHON

# Two installations into one environment at a time would break it.
.NOTPARALLEL:
.DEFAULT_GOAL := help

# What ruff has no rule for. Left out: 104 (misses a raise behind an isinstance; tests/test_structure.py looks at every
# broad except), 114 (needs a list of names), 127 (httpx can be exchanged in one place), 128 (misses a task_status that
# is handed on) and 900 (private async generators; tests/test_structure.py sees the public ones).
ASYNC_RULES = 101 102 103 111 112 113 118 119 120 121 122 123 124 125 126

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The stamp makes a second run instant; a changed pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml scripts/venv
	@sh scripts/venv $(VENV) $*
	@touch $@

.PHONY: demo
demo: $(VENV)/.installed-cli ## set up and run a batch of prompts against the built-in simulator
	@$(VENV)/bin/gorouter-trio demo

.PHONY: test
test: $(VENV)/.installed-test ## set up and run the tests, two at a time (WORKERS=0: in this process)
	@$(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

.PHONY: test-long
test-long: $(VENV)/.installed-test ## every test, the long ones too, with many more examples (hours)
	@$(RUN) -m pytest -m "" --hypothesis-profile=long --timeout=0 -o faulthandler_timeout=0 $(ARGS)

.PHONY: test-lowest
test-lowest: ## the tests with the oldest libraries that pyproject.toml admits, in .venv-lowest
	@sh scripts/venv .venv-lowest test
	@.venv-lowest/bin/python scripts/lowest.py > .venv-lowest/constraints.txt
	@sh scripts/venv .venv-lowest test .venv-lowest/constraints.txt
	@.venv-lowest/bin/python -m pytest $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.installed-fuzz ## fuzz every parser, SECONDS=60 each
	@set -e; for script in fuzz/fuzz_*.py; do echo "== $$script"; $(RUN) $$script --seconds $(or $(SECONDS),60); done

.PHONY: soak
soak: $(VENV)/.installed-test ## hours of chats, streams and sessions with faults, SECONDS=28800
	@$(RUN) fuzz/soak.py --seconds $(or $(SECONDS),28800)

.PHONY: coverage
coverage: $(VENV)/.installed-test ## the tests, and the lines and branches that none of them reaches
	@$(RUN) -m coverage run -m pytest $(ARGS)
	@$(RUN) -m coverage report

.PHONY: lint
lint: $(VENV)/.installed-lint ## ruff and flake8-async
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(VENV)/bin/flake8-async --enable "$$(echo $(ASYNC_RULES:%=ASYNC%) | tr ' ' ,)" $$(find gorouter_trio -name '*.py')

.PHONY: types
types: $(VENV)/.installed-test $(VENV)/.installed-lint ## mypy, strict, and pyright on what users write
	@$(RUN) -m mypy
	@$(VENV)/bin/basedpyright

.PHONY: format
format: $(VENV)/.installed-lint ## let ruff mend and lay out the code
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

.PHONY: check
check: lint types test ## lint, types and tests

.PHONY: bench
bench: $(VENV)/.installed-bench ## measure against other clients on this machine, and write the figures (40 minutes)
	@set -e; for script in $(wildcard benchmarks/bench_*.py); do \
		name=$$(basename $$script .py); echo "== $$name"; \
		$(RUN) $$script --json benchmarks/results/$${name#bench_}.json; \
	done
	@$(RUN) benchmarks/report.py

.PHONY: structure
structure: $(VENV)/.installed-test ## sizes, nesting, import loops, broad excepts, untyped names
	@PYTHONPATH=tests/support $(RUN) tests/test_structure.py

.PHONY: exports
exports: $(VENV)/.installed-test ## pin the package's public names as they are now
	@PYTHONPATH=tests/support $(RUN) tests/test_exports.py

.PHONY: clean
clean: ## remove caches and measurements
	@rm -rf .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist htmlcov
	@find gorouter_trio tests scripts $(wildcard benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## the same, and the environments
	@rm -rf .venv .venv-lowest
