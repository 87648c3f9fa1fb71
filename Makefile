# Every target sets up .venv by itself. PYTHON picks the interpreter, EXAMPLE what `make demo` runs, to which BACKEND
# and SEED go.
PYTHON ?= python3
EXAMPLE ?= ppo_cartpole
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LIBRARY := kernels estimators losses

.PHONY: demo test lint bench gpu static clean

# The folders are prerequisites because a strict editable install links files one by one: a new file needs a new link.
$(INSTALLED): pyproject.toml constraints.txt $(LIBRARY) losses/functional
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		--config-settings editable_mode=strict -e '.[test,examples,peer]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/$(EXAMPLE).py $(if $(BACKEND),--backend $(BACKEND)) $(if $(SEED),--seed $(SEED))

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(LIBRARY:%=-p fusedrl.%)

bench: $(INSTALLED)
	$(BIN)/python bench/returns.py --write
	$(BIN)/python bench/categorical.py --write

static: $(INSTALLED)
	$(BIN)/python bench/static_table.py --write

# On a CUDA machine: the tests on the device, the kernels under compute-sanitizer if it is there, the benchmark.
# A Python that has torchrl and fusedrl installed already is used as it is, so that no network is needed.
gpu:
	@if $(PYTHON) -c "import fusedrl.kernels, torchrl" 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) $(INSTALLED) && python=$(BIN)/python; fi; set -ex; \
	$$python -c "import torch; assert torch.cuda.is_available(), 'make gpu needs a CUDA device'"; \
	$$python -m pytest $(PYTEST); \
	if command -v compute-sanitizer; then \
		compute-sanitizer --error-exitcode 1 $$python -m pytest \
			tests/test_kernels_layouts.py tests/test_categorical_layouts.py; fi; \
	$$python bench/returns.py --write; \
	$$python bench/categorical.py --write

clean:
	rm -rf $(VENV) build out .pytest_cache .mypy_cache .ruff_cache .hypothesis
