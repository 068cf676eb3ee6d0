# The newest Python that runs here and is supported; another: make setup PYTHON=/path/to/python3.12
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Or each of hundreds of processes would compile the package anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test quick oldest bench wheels wheels-flash-4 lint parity docs

setup: .venv/ready

# `ready` is written last, so an interrupted set-up is made anew by the next call.
.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "There is no python3 here; reeltune needs 3.11, 3.12 or 3.13" >&2; exit 1; }
	@$(PYTHON) scripts/make_venv.py .venv
	@rm -f $@
	@echo "Installing into .venv (a few minutes, about 2 GB)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Another model: make demo FAMILY=easyanimate (reeltune demo --help lists them); an adapter: make demo ADAPTER=1
demo: setup
	$(BIN)/reeltune demo $(addprefix --family ,$(FAMILY)) $(if $(ADAPTER),--adapter)

# Three for two cores, as launches wait for one another. Files go to them in the order of their folders: those that take
# long come first, and nobody waits for one at the end.
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

# Without the slow half, which real launches and kills are. Little waits for another here: two find less to import
QUICK_WORKERS := $(WORKERS:3=2)
quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK_WORKERS) -m "not slow"

# The quick half with the oldest versions that are supported, in an environment of its own
OLDEST := .venv/oldest
oldest: setup
	@$(PYTHON) scripts/make_venv.py $(OLDEST)
	@sed 's/==.*//;/^#/d' constraints-oldest.txt | grep -viwFf - constraints.txt | cat - constraints-oldest.txt > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable ".[dev]"
	@touch $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(QUICK_WORKERS) -m "not slow"

bench: setup
	$(BIN)/python -m benchmarks

# For scripts/on_a_gpu.sh: what a machine with torch, transformers and accelerate lacks, for Python 3.12 on Linux
WHEELS = --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --dest wheels \
	--platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
	--platform manylinux2014_x86_64

wheels: setup
	$(BIN)/python -m pip download --quiet $(WHEELS) --constraint constraints.txt --requirement benchmarks/gpu/wheels.txt

wheels-flash-4: setup
	$(BIN)/python -m pip download --quiet $(WHEELS) --requirement benchmarks/gpu/wheels-flash-4.txt

parity: setup
	$(BIN)/python -m benchmarks.parity --write docs/parity.md

docs: setup
	$(BIN)/python scripts/recipe_page.py docs/recipe.md
	$(BIN)/python scripts/memory_page.py docs/memory.md
	$(BIN)/python scripts/adapters_page.py docs/adapters.md
	$(BIN)/python scripts/cache_picture.py docs/benchmarks.md docs/cache.png
	$(BIN)/python scripts/pose_picture.py docs/pose_drawing.png
	$(BIN)/python scripts/control_picture.py docs/control.png

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
