# The house's commands. `make quickstart` and `make test` are the two that a newcomer needs; each makes the virtual
# environment that it needs with `python -m venv` and pip, once, and starts in seconds after that.

# The interpreter: the first of these that runs and is 3.11 or newer. `make test PYTHON=python3.13` takes another one,
# in an environment of its own (.venv-3.13).
NEW_ENOUGH := -c "import sys; sys.exit(sys.version_info < (3, 11))"
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p $(NEW_ENOUGH) >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>/dev/null)
endif

RUN := $(VENV)/bin/python
# Memory in large pages where Linux gives them on request: much of a small step on the CPU is page faults otherwise.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# The environments are ours, so bytecode is kept in them: without it each start compiles some thousand modules.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(RUN) -m pip --disable-pip-version-check install -qq --prefer-binary --no-compile
# What an environment was made from: another interpreter, another place or other requirements make it anew.
STAMP = $$( ($(PYTHON) -c "import sys; print(sys.version, sys.base_prefix)"; pwd; cat pyproject.toml setup.py) \
	| cksum | tr -d ' ')

.PHONY: help quickstart test test-all test-lowest lint format goldens systems verify-weights venv venv-test clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

quickstart: venv ## train a small LLaVA on real handwriting, on the CPU, and question it (a few minutes)
	@$(RUN) -m vlm_jax.train --config=configs/quickstart.py

test: venv-test ## the tests, on two processes; ARGS="-k config" is passed on to pytest
	@$(RUN) -m pytest -n 2 --dist worksteal --durations=20 $(ARGS)

test-all: venv-test ## the slow tests too
	@$(RUN) -m pytest -n 2 --dist worksteal --durations=20 -m '' $(ARGS)

test-lowest: ## the tests with every dependency at its lower bound (Python 3.11)
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -c "import re, tomllib; \
	deps = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
	print('\n'.join(re.sub(r'>=([^,;]+),[^;]*', r'==\1', d).replace('[epath]', '') for d in deps))" \
		> .venv-lowest/constraints.txt
	@.venv-lowest/bin/python -m pip --disable-pip-version-check install -qq --prefer-binary --no-compile \
		-c .venv-lowest/constraints.txt -e ".[test]"
	@.venv-lowest/bin/python -m pytest -n 2 --dist worksteal --durations=20 $(ARGS)

lint: venv-test ## ruff (rules and format) and the types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: venv-test ## let ruff mend what it can
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

goldens: venv-test ## rewrite tests/goldens (every config resolved) and the guide's tables, after a change that is meant
	@$(RUN) tests/test_recipes.py && $(RUN) tests/test_coming_from.py

systems: ## the table of systems, from docs/systems.json, printed and put into README.md
	@$(PYTHON) docs/print_systems.py --write README.md

verify-weights: venv-test ## fetch a released model and compare it with transformers; MODEL=owner/name, IMAGE=FILE
	@$(RUN) -m vlm_jax.verify $(if $(MODEL),--model=$(MODEL)) $(if $(IMAGE),--image=$(IMAGE))

venv: ## an environment for using vlm_jax
	@$(call install,core,.)

venv-test: ## an environment for working on it
	@$(call install,test,".[test]")

clean: ## remove the environments and caches (never runs/)
	@rm -rf .venv .venv-* .pytest_cache .ruff_cache .mypy_cache *.egg-info

# $(call install,NAME,REQUIREMENT): nothing to do if the stamp NAME, or `test` (which holds everything), is current.
define install
set -e; \
$(PYTHON) $(NEW_ENOUGH) 2>/dev/null || { \
	echo "error: '$(PYTHON)' is not Python 3.11 or newer; say which: PYTHON=/path/to/python3.11" >&2; exit 2; }; \
stamp=$(STAMP); \
for name in $(1) test; do \
	if [ "$$(cat $(VENV)/.vlm_jax-$$name 2>/dev/null)" = "$$stamp" ]; then exit 0; fi; \
done; \
if ! $(RUN) -c "import sys, pip; v, b = sys.version, sys.base_prefix" >/dev/null 2>&1 || \
	[ "$$($(RUN) -c 'import sys; print(sys.version, sys.base_prefix)')" != \
	  "$$($(PYTHON) -c 'import sys; print(sys.version, sys.base_prefix)')" ]; then \
	echo "making $(VENV) with $$($(PYTHON) --version)" >&2; \
	$(PYTHON) -m venv --clear $(VENV); \
fi; \
echo "installing into $(VENV) (about half a minute from a warm cache, some minutes over a network)" >&2; \
$(PIP) -e $(2); \
echo "$$stamp" > $(VENV)/.vlm_jax-$(1)
endef
