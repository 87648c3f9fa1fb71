# Every target sets up .venv by itself. PYTHON picks the interpreter, EXAMPLE what `make demo` runs, with the SEED and on
# the BACKEND, and SUITES what is benchmarked (all: scans projection losses updates).
PYTHON ?= python3
EXAMPLE ?= ppo_cartpole
VENV := .venv
CONSTRAINTS := constraints.txt
EXTRAS := test,examples,peer
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LIBRARY := kernels estimators losses

.PHONY: demo test newest emulate lint bench readme gpu static clean

# The folders are prerequisites because a strict editable install links files one by one: a new file needs a new link.
$(INSTALLED): pyproject.toml constraints.txt $(LIBRARY) losses/functional
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %) \
		--config-settings editable_mode=strict -e '.[$(EXTRAS)]'
	touch $@

demo: $(INSTALLED)
	$(if $(BACKEND),FUSEDRL_BACKEND=$(BACKEND)) $(BIN)/python examples/$(EXAMPLE).py $(if $(SEED),--seed $(SEED))

# As many workers as cores: a worker with several threads would only keep the others waiting.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST)
	$(if $(PYTEST),,$(MAKE) emulate PYTEST='-k "hand_computed or share or one_program or loaded or nan"')

# The tests with the newest versions of everything, such as users install, instead of the pinned ones; without TorchRL,
# which holds tensordict back.
newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS= EXTRAS=test,examples

# The tests of the kernels once more, on what they compile to for sm_90: an emulator runs it, which needs a C compiler.
# `make emulate TESTS=tests/test_parity_*.py` runs others on it.
TESTS ?= tests/test_kernels_*.py tests/test_categorical*.py tests/test_vtrace.py
emulate: $(INSTALLED)
	FUSEDRL_EMULATE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(TESTS) $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(LIBRARY:%=-p fusedrl.%)

# Measures and prints tables: `make bench SUITES=losses`; with WRITE=1 the results files and the README's tables too.
bench: $(INSTALLED)
	$(BIN)/python -m bench $(SUITES) $(if $(WRITE),--write)
	$(if $(SUITES),,$(BIN)/python bench/host_cost.py $(if $(WRITE),--write))
	$(if $(WRITE),$(BIN)/python -m bench.readme)

readme: $(INSTALLED)
	$(BIN)/python -m bench.readme

static: $(INSTALLED)
	$(BIN)/python bench/static_table.py --write

# On a CUDA machine: the tests on the device, the kernels under compute-sanitizer if it is there, the benchmarks.
# A Python that has torchrl and fusedrl installed already is used as it is, so that no network is needed.
gpu:
	@if $(PYTHON) -c "import fusedrl.kernels, torchrl" 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) $(INSTALLED) && python=$(BIN)/python; fi; set -ex; \
	$$python -c "import torch; assert torch.cuda.is_available(), 'make gpu needs a CUDA device'"; \
	$$python -m pytest $(PYTEST); \
	if command -v compute-sanitizer; then \
		compute-sanitizer --error-exitcode 1 $$python -m pytest \
			tests/test_kernels_layouts.py tests/test_categorical_layouts.py; fi; \
	$$python -m bench $(SUITES) --write; \
	$$python -m bench.readme; \
	$$python -m bench.profile gae --shape 4096x128 65536x32 8192x2048

clean:
	rm -rf $(VENV) .venv-newest build out .pytest_cache .mypy_cache .ruff_cache .hypothesis
