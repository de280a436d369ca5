# DEVICE=cpu installs the CPU build of torch; DEVICE=cuda the one with CUDA (several gigabytes).
DEVICE ?= cpu
VENV ?= .venv
BOOTSTRAP ?= python3
PYTHON ?= $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
READY := $(VENV)/.ready-$(DEVICE)

JOBS ?= auto
BASE ?= demo/zoo/base
PROTO := $(sort $(wildcard proto/deltaserve/*/*.proto))
STUBS ?= proto

.DEFAULT_GOAL := help
.PHONY: help install demo serve test aot check fix stubs console zoo bench

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(READY)  ## the environment in $(VENV), with the development tools

# The wheel named +cpu is first looked for where pip is configured to look, then at PyTorch's own
# index; the constraints keep every later step from replacing it.
$(READY): pyproject.toml constraints.txt constraints-$(DEVICE).txt
	$(BOOTSTRAP) -m venv $(VENV)
	if [ "$(DEVICE)" = cpu ]; then \
	    $(PIP) install -q -c constraints-cpu.txt torch 2>/dev/null \
	    || $(PIP) install -q -c constraints-cpu.txt --extra-index-url $(TORCH_CPU_INDEX) torch; \
	fi
	$(PIP) install -q -c constraints-$(DEVICE).txt -e '.[dev]'
	touch $@

demo: install  ## serve the zoo, send one mixed batch, print who answered what (ONCE=1: then stop)
	$(PYTHON) demo/run.py

serve: install  ## serve BASE=folder with ARGS="..."
	$(VENV)/bin/deltaserve serve --base $(BASE) $(ARGS)

# A file's tests stay on one worker, for they share what is slow to make; one thread each, as there
# are as many workers as cores.
test: install  ## the whole test suite (JOBS=workers, ARGS="-k ...")
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

aot: install  ## compile the GPU kernels without a GPU, hold them to their budgets (ARGS="--all")
	$(PYTHON) tests/aot/launches.py
	$(PYTHON) tests/aot/gate.py $(ARGS)

check: install  ## lint, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

fix: install  ## lint and format, in place
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

stubs:  ## regenerate the stubs of proto/deltaserve (into STUBS), and docs/api.md
	$(PYTHON) -m grpc_tools.protoc -Iproto --python_out=$(STUBS) --pyi_out=$(STUBS) \
	    --grpc_python_out=$(STUBS) --mypy_grpc_out=$(STUBS) $(PROTO)
	if [ "$(STUBS)" = proto ]; then $(PYTHON) docs/api_reference.py; fi

console:  ## build the console's page from clients/console, with node 20 or later
	npm --prefix clients/console ci
	npm --prefix clients/console run build

zoo: install  ## train the zoo anew (about ten minutes on two cores)
	$(PYTHON) demo/build.py

bench: install  ## tokens per second of mixed batches beside transformers + PEFT
	$(PYTHON) benchmarks/mixed.py $(ARGS)
