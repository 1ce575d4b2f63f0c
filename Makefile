# make demo | make test: both work in a fresh clone. The first call builds .venv and the demo model.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast env model lint dist kvpress soak soak-load compile-gate flashinfer-gate bench-kernels bench-budget1 bench-agents bench-short bench-originals bench-stranger bench-pieces bench-tree bench-span-quality bench-metrics bench-quality clean distclean
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.keepkv-installed
export KEEPKV_CACHE ?= $(CURDIR)/.cache
PYTEST_ARGS ?=
ARGS ?=

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: env model ## a multi-turn agent on a real server, KeepKV beside full cache
	$(BIN)/keepkv demo

test: lint model ## lint, then every test (also on a live server)
	@echo "== pytest"
	@PYTHON=$(BIN)/python scripts/run_tests.sh $(PYTEST_ARGS)

test-fast: lint ## the same without the tests that start a server
	@$(BIN)/python -m pytest -m "not server and not soak and not gpu" $(PYTEST_ARGS)

lint: env ## ruff, mypy and the walls between rooms
	@echo "== ruff"
	@$(BIN)/ruff check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== walls"
	@$(BIN)/lint-imports --no-cache > $(VENV)/walls.log || { tail -n +12 $(VENV)/walls.log; exit 1; }

env: $(STAMP) ## .venv with SGLang (quick when it exists)

model: env ## the demo model as a Hugging Face folder in .cache (quick when it exists)
	@$(BIN)/keepkv model

dist: env model ## sdist and wheel into dist/, and one request from the installed wheel (ARGS=--empty: all from nothing)
	@$(BIN)/python scripts/check_dist.py $(ARGS)

# --no-deps: kvpress's metadata asks for an older transformers than SGLang pins, and it runs with that one (peers.py).
# The other three are what it imports and we lack. Exact versions: parity is with this one release.
KVPRESS := kvpress==0.5.5
KVPRESS_NEEDS := cachetools==5.5.2 fire==0.6.0 termcolor==3.3.0
KVPRESS_DIR := $(KEEPKV_CACHE)/kvpress
KVPRESS_STAMP := $(KVPRESS_DIR)/.$(subst ==,-,$(KVPRESS))

kvpress: env $(KVPRESS_STAMP) ## kvpress beside ours for keepkv eval --peers (quick when it exists)

$(KVPRESS_STAMP):
	@echo "== $(KVPRESS) into $(KVPRESS_DIR)"
	@rm -rf $(KVPRESS_DIR)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(KVPRESS_DIR) $(KVPRESS) $(KVPRESS_NEEDS)
	@touch $@

soak: env model ## the long runs that make test leaves out
	@KEEPKV_SOAK=1 $(BIN)/python -m pytest tests/radix/test_tree_machine.py tests/radix/test_cache_machine.py --timeout 7200 $(PYTEST_ARGS)
	@$(BIN)/python -m pytest -m soak --timeout 1800 $(PYTEST_ARGS)
	@KEEPKV_SOAK=1 $(BIN)/python -m pytest tests/server/test_second_model.py --timeout 1800 $(PYTEST_ARGS)

soak-load: env model ## two servers under random load with faults, 15 minutes each: ARGS="--seed 2 --seconds 60 --shape tiny"
	$(BIN)/python -m tests.soak $(ARGS)

compile-gate: env ## every Triton kernel compiled for sm_80, sm_90, sm_100 (no GPU): registers against the committed table
	$(BIN)/python -m keepkv_sglang.kernels.compile_gate --cases keepkv_sglang.tools.compile_cases $(ARGS)

flashinfer-gate: env ## compile the FlashInfer kernels without a GPU: no register or spill more than recorded (10-20 min)
	$(BIN)/python -m keepkv_sglang.kernels.attention.flashinfer_build --gate

bench-kernels: env model ## attention kernels against SGLang's torch_native, votes, bandwidth; compression against prefill; codecs
	$(BIN)/python benchmarks/bench_attention.py --threads 2 $(ARGS)
	$(BIN)/python benchmarks/bench_compression.py
	$(BIN)/python benchmarks/bench_codec.py

bench-metrics: env model ## what --enable-metrics costs, against a decode step
	$(BIN)/python benchmarks/bench_metrics.py $(ARGS)

bench-budget1: env model ## stock SGLang against KeepKV at budget 1, side by side
	$(BIN)/python benchmarks/bench_budget1.py

bench-agents: env model ## six agents, a tight and an ample pool: stock SGLang, KeepKV, KeepKV at budget 1
	$(BIN)/keepkv bench agents --budget1 --repeat 3 --pool 3000 --pool 40000

bench-short: env model ## what KeepKV costs requests that it never compresses: two servers that take turns
	$(BIN)/python benchmarks/bench_short.py $(ARGS)

bench-stranger: env model ## what one client can cost another: the worst requests beside a neighbour's stream (8 min)
	$(BIN)/python benchmarks/bench_stranger.py $(ARGS)

bench-pieces: env model ## how long a stream stops while a long prompt of another is compressed, at once and in pieces (8 min)
	$(BIN)/python -m benchmarks.bench_pieces $(ARGS)

bench-originals: env model ## what reading a history over its originals costs and saves: first token, twenty turns
	$(BIN)/python benchmarks/bench_originals.py $(ARGS)

bench-tree: env ## a million cached tokens: our tree against SGLang's RadixCache
	$(BIN)/python benchmarks/bench_tree.py

bench-span-quality: env model ## quality of merging without queries, and of cutting long turns (needs ../shared/data)
	$(BIN)/python benchmarks/bench_span_quality.py

bench-quality: env model kvpress ## keepkv eval on the held-out documents, kvpress beside ours: hours (needs ../shared/data)
	$(BIN)/keepkv eval --peers

clean: ## caches and build output; keeps .venv and the model
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov
	find . \( -path ./$(VENV) -o -path ./.git \) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## clean, and .venv and the model too
	rm -rf $(VENV) .cache

# The first Python that is new enough and can make a virtual environment. Candidates are run, not only
# looked up: a version manager's shim exists for versions that are not selected.
FIND_PYTHON = for p in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; \
	done || true

# pip writes about a thousand lines for SGLang. Shown: big downloads, builds, errors and the end; the rest is
# in the log.
SHOW_PIP = awk '/^Collecting /{n++; if (n % 40 == 0) show("... " n " packages resolved")} \
	/Downloading .*\([0-9.]+ GB\)|Downloading .*\([0-9][0-9][0-9](\.[0-9]+)? MB\)/{show($$0)} \
	/^ *Building wheel|^ERROR|^error|No space left/{show($$0)} \
	/^Installing collected packages/{show("installing " gsub(/,/, ",") + 1 " package(s); many take minutes without a word")} \
	/^Successfully installed/{show("installed")} \
	function show(s) {sub(/^ +/, "", s); print "  pip: " substr(s, 1, 110); fflush()}'

$(STAMP): pyproject.toml
	@if [ ! -x $(BIN)/python ]; then \
		python=$$($(FIND_PYTHON)); \
		if [ -z "$$python" ]; then \
			echo "No usable Python: 3.11 or newer with venv and ensurepip is needed (Debian: apt-get install python3-venv)." >&2; \
			echo "Point PYTHON at one: make $(or $(MAKECMDGOALS),env) PYTHON=/path/to/python3.11" >&2; exit 1; \
		fi; \
		echo "== $(VENV) from $$($$python --version)"; \
		$$python -m venv $(VENV); \
	fi
	@echo "== SGLang and its dependencies into $(VENV): 5-10 minutes and 11 GB the first time (log: $(VENV)/pip.log)"
	@start=$$SECONDS; export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1; \
	if ! $(BIN)/python -m pip install --progress-bar off -e ".[demo,dev]" 2>&1 \
		| tee $(VENV)/pip.log | $(SHOW_PIP); then \
		echo "pip failed; the end of $(VENV)/pip.log:" >&2; tail -n 15 $(VENV)/pip.log >&2; exit 1; \
	fi; \
	$(BIN)/python -m keepkv_sglang.kernels.cpu_build > /dev/null 2> $(VENV)/kernels.log \
		|| echo "No C++ kernels ($(VENV)/kernels.log): attention runs on Numba, the rest on torch, slower."; \
	echo "== ready after $$((SECONDS - start)) s, $$(du -sh $(VENV) | cut -f1)"
	@touch $@
