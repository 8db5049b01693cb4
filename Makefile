# One word per duty. `make` alone lists them.
#
#   make train RECIPE=fashion-mnist-vae ARGS="--steps 1000"      make test ARGS="-k client"
#   PYTHON and VENV choose the interpreter and where the virtual environment lies.

PYTHON ?= python3
VENV ?= .venv
MODELS ?= zoo
PORT ?= 8000
MINUTES ?= 20
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo serve train test test-docker check format bench peers clean

help: ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make the virtual environment and install everything, in the versions of constraints.txt

$(INSTALLED): pyproject.toml client/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Drawwell needs Python 3.11 or later; $(PYTHON) is " + sys.version.split()[0] + " (another one: make PYTHON=python3.12 …)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' -e ./client
	@touch $@

demo: $(INSTALLED) ## serve the models of zoo/, draw and score with each of them, then go on serving
	@$(BIN)/python scripts/demo.py --models $(MODELS) --port $(PORT) --out demo-out

serve: $(INSTALLED) ## serve the models of zoo/ (MODELS=…, PORT=…)
	$(BIN)/python -m service serve --models $(MODELS) --port $(PORT) $(ARGS)

train: $(INSTALLED) ## train by a recipe: RECIPE=…; without one, list them
	$(BIN)/python -m training $(if $(RECIPE),run $(RECIPE) $(ARGS),list)

# Tests that start several processes are one group, so that never two of them crowd the machine at once, and whoever
# computes does so with one thread.
test: $(INSTALLED) ## run the tests, JOBS=… at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup $(ARGS)

test-docker: ## build the images, and try the stack of docker-compose.yml with them (needs Docker)
	docker/test.sh

check: $(INSTALLED) ## format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## put the code into its format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## measure speed (MINUTES=…), side by side with other servers once `make peers` has set them up
	$(BIN)/python -m benchmarks --minutes $(MINUTES) $(ARGS)

peers: $(INSTALLED) ## set up the other servers, each in a virtual environment of its own
	$(BIN)/python -m benchmarks.peers setup

clean: ## remove what can be made again (not runs/, not the data)
	rm -rf $(VENV) .venv-peers demo-out dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
