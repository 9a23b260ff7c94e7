# make demo    answers prompts with SmolLM2-135M and six adapters in one batch
# make test    runs all tests
# make lint    checks style and types
# make model   fetches SmolLM2-135M, which demo and test do too
# make clean   removes what the others made
#
# Settings, as in: make demo MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
#   MODEL=...     base model of the demo: a Hugging Face id or directory, or a GGUF file
#   ADAPTERS=...  directory of adapters for it, each in a directory of its own
#   EXTRAS=cuda13 also installs JAX for NVIDIA GPUs
#   PYTHON=...    Python to use, 3.12 or newer
#   PYTEST=...    arguments of pytest, as in: make test PYTEST="tests/slora_jax -k cli"

VENV := .venv
BIN := $(VENV)/bin
GGUF := examples/models/SmolLM2-135M-Instruct.Q4_1.gguf
ADAPTERS ?= examples/adapters
EXTRAS ?=
# A file's tests share engines, so they stay in one process; conftest.py puts the slowest file first.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
# XLA has one thread, as two processes fill two cores, except where kernels are interpreted, whose callbacks wait for
# each other, and where tests need several devices: with one they are skipped, which tests/conftest.py makes a failure.
SEVERAL_THREADS := tests/examples tests/pallas_kernels tests/sharding tests/slora_jax/test_layout_choice.py
ONE_THREAD := JAX_NUM_CPU_DEVICES=1 NPROC=1 PJRT_NPROC=1
comma := ,
# A stamp says what is installed; other EXTRAS have another stamp.
RUN_STAMP := $(VENV)/.installed-run$(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))
DEV_STAMP := $(VENV)/.installed-dev$(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint model clean
.DELETE_ON_ERROR:

demo: $(RUN_STAMP) $(if $(MODEL),,$(GGUF))
	$(BIN)/slora-jax demo --model "$(or $(MODEL),$(GGUF))" --adapters "$(ADAPTERS)"

test: export SLORA_SMOLLM2_GGUF := $(CURDIR)/$(GGUF)
test: $(DEV_STAMP) $(GGUF)
ifeq ($(origin PYTEST),undefined)
	$(ONE_THREAD) $(BIN)/python -m pytest $(WORKERS) $(SEVERAL_THREADS:%=--ignore=%); first=$$?; \
	$(BIN)/python -m pytest $(WORKERS) $(SEVERAL_THREADS) && exit $$first
else
	$(BIN)/python -m pytest $(PYTEST)
endif

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

model: $(GGUF)

clean:
	rm -rf $(VENV) .cache examples/models .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python="$(PYTHON)"; test -n "$$python" || python="$$(sh .ci/find-python)" || exit 1; \
	echo "making $(VENV) with $$("$$python" --version)"; "$$python" -m venv --clear $(VENV)

$(RUN_STAMP): pyproject.toml | $(BIN)/python
	@echo "installing slora-jax into $(VENV); the first time this takes a few minutes"
	@$(PIP_INSTALL) -e ".$(if $(EXTRAS),[$(EXTRAS)])"
	@touch $@

$(DEV_STAMP): pyproject.toml | $(BIN)/python
	@echo "installing slora-jax and its development tools into $(VENV); the first time this takes a few minutes"
	@$(PIP_INSTALL) -e ".[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]"
	@touch $@

$(GGUF): | $(BIN)/python
	@$(BIN)/python examples/fetch_model.py $@
