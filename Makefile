# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first, with the versions that
# constraints.txt pins. PYTHON=python3.12 chooses another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
SERVES := $(VENV)/.serves
INSTALLED := $(VENV)/.installed
PORT ?= 8000

.PHONY: demo test test-all install lint types package image-check manifests-check manifests proto docs-cli clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo     serve the demo model and its adapters on http://127.0.0.1:$(PORT)'
	@echo 'make test     run the test suite'
	@echo 'make test-all run it with ten thousand structured documents'
	@echo 'make install  make $(VENV) with everything pinned, and $(BIN)/lorafleet'
	@echo 'make lint     ruff, then types'
	@echo 'make docs     build the documentation into build/docs'
	@echo 'make reference    write the tables of docs/reference/ that follow from the code'
	@echo 'make package  build the wheel, with the kernels prebuilt, and try it outside the tree'
	@echo 'make image-check  run the steps of deploy/docker/Dockerfile, without Docker'
	@echo 'make manifests-check  have checkov look at the Kubernetes manifests'
	@echo 'make manifests    render the base of the Kustomize overlay anew'
	@echo 'make proto    regenerate the gRPC stubs'
	@echo 'make docs-cli regenerate the reference of the command line'

install: $(INSTALLED)

# What serving needs and the SDK. On a machine without a GPU the build of torch for CPUs, a tenth as large, from torch's
# own index if that can be reached.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
IS_REACHABLE := import urllib.request; urllib.request.urlopen("$(TORCH_INDEX)/torch/", timeout=5)

$(SERVES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LoRAFleet needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing what serving needs, torch first of all: minutes, most of them downloads.'
	@index=''; if ! command -v nvidia-smi > /dev/null && $(PYTHON) -c '$(IS_REACHABLE)' 2> /dev/null; then \
		index='--extra-index-url $(TORCH_INDEX)'; fi; set -x; $(PIP) $$index --editable '.[demo]'
	@touch $@

$(INSTALLED): $(SERVES)
	@echo 'Installing what tests, linters and benchmarks need.'
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(SERVES)
	@exec $(BIN)/lorafleet demo --host 127.0.0.1 --port $(PORT)

test: install
	$(BIN)/python -m pytest

test-all: install
	LORAFLEET_TEST_ALL=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# Type checkers cannot follow the editable install's import hook, so they read a copy of the tree under its import name.
# Tests and examples import their own modules by bare names, as pytest's pythonpath lets them.
types: build/source/.beside
	cd build/source && MYPYPATH=tests:examples ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache --python-executable ../../$(BIN)/python lorafleet tests benchmarks examples

# Beside the package's folder, so that the wheel, which is made from that folder, neither carries nor waits for them.
build/source/.beside: build/source/.copied $(shell find tests benchmarks examples -name '*.py')
	rm -rf $(addprefix build/source/,tests benchmarks examples)
	cp -r tests benchmarks examples build/source
	@touch $@

build/source/.copied: $(INSTALLED) __init__.py $(shell find controller examples kernels proto workers -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.proto')
	rm -rf build/source && mkdir -p build/source/lorafleet
	cp -r __init__.py controller examples kernels proto workers pyproject.toml README.md LICENSE build/source/lorafleet
	rm -rf build/source/lorafleet/kernels/cpu/prebuilt
	@touch $@

# Strict: a link that leads nowhere is an error. Nothing is fetched, and the pages load nothing from elsewhere.
.PHONY: docs reference
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/docs

$(VENV)/.docs: $(INSTALLED)
	$(PIP) --quiet --editable '.[docs]'
	@touch $@

# A test says when they are no longer what the code says.
reference: install
	$(BIN)/python tests/reference_pages.py

package: build/wheel/.built
	cd build/wheel && ../../$(BIN)/python -P ../../tests/check_wheel.py .

# The wheel carries the kernels of every instruction set. They go into the copy, so that no prebuilt library lies in the
# tree; build/prebuilt keeps them, under names that change with the C++ sources. The tag says which glibc they need.
build/wheel/.built: build/source/.copied
	rm -rf build/wheel dist
	platform=$$($(BIN)/python -P build/source/lorafleet/kernels/build.py --out build/prebuilt) \
		&& cp -r build/prebuilt build/source/lorafleet/kernels/cpu/ \
		&& $(BIN)/python -m build --wheel -C--build-option=--plat-name=$$platform --outdir dist build/source/lorafleet \
		> /dev/null
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target build/wheel dist/*.whl
	@touch $@

image-check: install
	$(BIN)/python -u tests/check_image.py

# checkov pins much that we do not, so it has an environment of its own.
manifests-check: install build/checkov/bin/checkov
	$(BIN)/python tests/check_manifests.py build/checkov/bin/checkov

build/checkov/bin/checkov:
	$(PYTHON) -m venv build/checkov
	build/checkov/bin/pip install --disable-pip-version-check --quiet --constraint .ci/checkov.txt checkov

# What the Kustomize overlay lies over; a test says when it is no longer what the chart renders.
manifests: install
	$(BIN)/python tests/manifests.py

proto: install
	rm -rf build/proto && mkdir -p build/proto
	$(BIN)/python -m grpc_tools.protoc -I lorafleet/proto=proto --python_out=build/proto --grpc_python_out=build/proto \
		--pyi_out=build/proto proto/worker.proto proto/controller.proto proto/rank.proto
	mv build/proto/lorafleet/proto/* proto/

# What the options say of themselves; a test says when the page is no longer that.
docs-cli: install
	mkdir -p build && $(BIN)/python -m lorafleet.controller.commands.reference > build/cli.md && mv build/cli.md docs/reference/cli.md

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
