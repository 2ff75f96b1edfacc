# `make help` lists the targets. Any Python 3.10–3.14 with venv will do; PYTHON=… names one.
.DEFAULT_GOAL := help
.PHONY: help venv demo check test sanitize fuzz kill bench gpu-check docs lint format clean distclean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter of a supported version that can make an environment.
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo $$p; break; }; done)

# More arguments for pip. A host without a GPU saves gigabytes with the index of torch's CPU builds, as it is then told.
PIP_FLAGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off $(PIP_FLAGS) -c constraints.txt

# $(call quietly,COMMAND): what the command prints is shown where it fails, every word of it, and nowhere else.
LOG := $(VENV)/install.log
quietly = $(1) >$(LOG) 2>&1 || { cat $(LOG) >&2; false; }

# Processes of tests and demo, and arguments for pytest: make test PYTEST_FLAGS="-k plan"
JOBS ?= 2
PYTEST_FLAGS ?=

# One thread a process: the processes already fill the cores.
export OMP_NUM_THREADS ?= 1

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP) ## make .venv and install everything into it

# torchrec goes in alone and without its requirements: it asks for the CUDA build of fbgemm-gpu, which would overwrite
# fbgemm-gpu-cpu and cannot be imported without a GPU driver. Its other requirements are in the extra `torchrec`.
$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt $(wildcard embtables/ops/csrc/*)
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "embtables needs Python 3.10 to 3.14 with venv and pip; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) ($$($(BIN)/python --version)); the first time this downloads torch and takes minutes."
	@$(BIN)/python .ci/announce.py $(PIP_FLAGS) -c constraints.txt
	@$(call quietly,$(PIP) --editable '.[dev]')
	@$(call quietly,$(PIP) --no-deps torchrec fbgemm-gpu-cpu)
	@$(call quietly,$(PIP) --no-deps --no-compile $(FRAMEWORKS)) || \
		echo "FuxiCTR and DeepCTR-Torch cannot be installed for this Python; the tests that need them are skipped."
	@$(call quietly,$(PIP) --no-deps --no-compile $(TRAINERS)) || \
		echo "Lightning and Accelerate cannot be installed for this Python; the tests that need them are skipped."
	@$(call quietly,$(PIP) --no-deps --no-compile $(ONNX)) || \
		echo "ONNX Runtime cannot be installed for this Python; the tests that need it are skipped."
	@$(call quietly,$(PIP) --no-deps --no-compile $(LOGGERS)) || \
		echo "MLflow and Weights & Biases cannot be installed for this Python; the tests that need them are skipped."
	@$(call quietly,$(PIP) --no-deps --no-compile $(SERVER)) || \
		echo "FastAPI, Uvicorn and HTTPX cannot be installed for this Python; the tests that need them are skipped."
	@touch $@

# What tests and examples use besides, and all that it imports there, by name: nothing else is installed or changed.
# The frameworks of examples/compress_*.py:
FRAMEWORKS := fuxictr deepctr-torch scikit-learn scipy joblib threadpoolctl narwhals h5py requests urllib3 idna certifi \
	charset-normalizer ray click msgpack jsonschema jsonschema-specifications referencing rpds-py attrs
# Those whose checkpoints resume a training, and what exported tables run in:
TRAINERS := pytorch-lightning accelerate
ONNX := onnxruntime onnxscript onnx onnx-ir ml_dtypes
# Where single runs are logged:
LOGGERS := mlflow-skinny sqlalchemy alembic mako sqlparse cryptography cffi pycparser databricks-sdk cachetools fastapi \
	starlette anyio importlib_metadata zipp opentelemetry-api opentelemetry-sdk opentelemetry-proto \
	opentelemetry-semantic-conventions wandb platformdirs xxhash
# What examples/serve_fastapi.py runs in, and who asks it:
SERVER := fastapi starlette anyio uvicorn click h11 httpx httpcore idna certifi

# 200,000 generated rows over 1.3 MB of tables. A second call shows the results again; `make clean` forgets them.
DEMO := runs/demo
demo: $(STAMP) ## the main job on generated data: which tables to take within 10 % and within 1 % of the bytes
	$(BIN)/embtables prepare synthetic - $(DEMO)/synthetic --rows 200000 --cardinalities 20000,5000,1000,100 --unseen 0.02
	$(BIN)/embtables recommend $(DEMO)/synthetic --budget 10%,1% --model dlrm --set tables.learning_rate=0.01 \
		--jobs $(JOBS) --out $(DEMO)/recommended

# The tests marked `core`: those that find the most in the least time, for use while a change is written.
# Only the files that hold some are collected: importing all others would take longer than the tests.
check: lint ## ruff, mypy and the core of the tests, in less than a minute
	$(BIN)/python -m pytest -n $(JOBS) -m "core and not slow" $(PYTEST_FLAGS) $$(grep -rl --include='test_*.py' 'mark\.core' tests)

# Files in the order of tests/conftest.py, not by how many tests they hold.
test: $(STAMP) ## every test, ruff and mypy among them
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

# Random programs for each build; 400 take about eight minutes on two cores.
SEEDS ?= 200
sanitize: $(STAMP) ## the native kernels alone, all instruction sets, under AddressSanitizer, UBSan and ThreadSanitizer
	EMBTABLES_SANITIZE_SEEDS=$(SEEDS) $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_FLAGS) tests/ops/test_ops_sanitizers.py

# INPUTS for each of 35 kinds of files: 200 take about two minutes on one core.
INPUTS ?= 200
fuzz: $(STAMP) ## damage every kind of file at random: a clean sentence, or the meaning that it had
	EMBTABLES_FUZZ_INPUTS=$(INPUTS) $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_FLAGS) tests/damage/test_fuzz.py

# KILLS for each of six commands, and of writers of versions that others read: 50 take about eight minutes on one core.
KILLS ?= 50
kill: $(STAMP) ## kill every command at random moments: the next start ends as if nothing had been
	EMBTABLES_KILLS=$(KILLS) $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_FLAGS) tests/damage/test_kill.py tests/serving/test_versions.py -k "test_kill or kills"

# BENCH_FLAGS="--quick" takes about three minutes, "--full" hours; --help tells the rest. Let nothing else run beside it.
bench: $(STAMP) ## time lookups, training steps and whole models side by side with their rivals, about half an hour
	$(BIN)/python -m benchmarks.bench $(BENCH_FLAGS)

# Without .venv: python -m benchmarks.gpu_check
gpu-check: $(STAMP) ## on a GPU: the tests of its kernels, every method against the CPU, the speed; eight minutes at most
	$(BIN)/python -m benchmarks.gpu_check

docs: $(STAMP) ## the pages and the reference of the public names as a site: build/docs/docs/index.html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . build/docs

lint: $(STAMP) ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff format the code and sort the imports
	$(BIN)/ruff check --fix-only --select I .
	$(BIN)/ruff format .

clean: ## remove what builds, tests and the demo leave behind
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(DEMO) runs/bench runs/gpu-check embtables/ops/_native.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## the same, and the environment
	rm -rf $(VENV)
