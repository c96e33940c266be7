# The first two commands of a newcomer are `make demo` and `make test`: each sets up what it needs.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: setup demo test check bench serve

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@[ -x $(BIN)/python ] || uv venv --quiet --python '>=3.11' .venv 2>/dev/null || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make setup got $$($(BIN)/python -V), cfvit needs 3.11 or newer: make setup PYTHON=python3.11" >&2; rm -rf .venv; exit 1; }
	@command -v uv >/dev/null || [ -x $(BIN)/uv ] || $(BIN)/python -m pip install --quiet uv
	@echo "Installing cfvit and its tools into .venv ..."
	@UV=$$(command -v uv || echo $(BIN)/uv); $$UV pip install --quiet --compile-bytecode --python $(BIN)/python \
	    --constraints constraints.txt --editable '.[plots,train,demo,serve]' --group dev
	@touch $@

demo: setup
	@$(BIN)/cfvit demo

# Exports apart: in the whole suite OpenVINO twice ended the process that ran its tests. Ray, whose tests mostly wait,
# has the process beside them.
test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --ignore tests/test_export.py --ignore tests/test_ray.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/test_export.py tests/test_ray.py

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/pylint src tests

bench: setup
	@$(BIN)/cfvit bench

serve: setup
	@$(BIN)/cfvit serve
