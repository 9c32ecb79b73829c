# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first, with the versions that
# constraints.txt pins. PYTHON=python3.12 chooses another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PORT ?= 8000

.PHONY: demo test install lint types package image-check manifests-check manifests proto clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo     serve the demo model and its adapters on http://127.0.0.1:$(PORT)'
	@echo 'make test     run the test suite'
	@echo 'make install  make $(VENV) with everything pinned, and $(BIN)/lorafleet'
	@echo 'make lint     ruff, then types'
	@echo 'make package  build the wheel, with the kernels prebuilt, and try it outside the tree'
	@echo 'make image-check  run the steps of deploy/docker/Dockerfile, without Docker'
	@echo 'make manifests-check  have checkov look at the Kubernetes manifests'
	@echo 'make manifests    render the base of the Kustomize overlay anew'
	@echo 'make proto    regenerate the gRPC stubs'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LoRAFleet needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@model=$$($(BIN)/python examples/demo_model.py) && exec $(BIN)/lorafleet serve "$$model" \
		--served-model-name smollm2 --host 127.0.0.1 --port $(PORT) --enable-lora \
		--lora-modules sql=examples/adapters/sql pirate=examples/adapters/pirate json=examples/adapters/json

test: install
	$(BIN)/python -m pytest

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

build/source/.copied: $(INSTALLED) __init__.py $(shell find controller kernels proto workers -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.proto')
	rm -rf build/source && mkdir -p build/source/lorafleet
	cp -r __init__.py controller kernels proto workers pyproject.toml README.md LICENSE build/source/lorafleet
	rm -rf build/source/lorafleet/kernels/cpu/prebuilt
	@touch $@

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

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
