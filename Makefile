# SPDX-License-Identifier: Apache-2.0
# `make train` trains on real vectors with no server, `make test` runs all tests. Both set everything up first.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# A shell's own PYTHONPATH would come before what is installed here.
unexport PYTHONPATH

.PHONY: train test check dist flink images benchmarks clean

train: $(READY)
	$(BIN)/python -m tests.demo patches .data/patches
	$(BIN)/knn-train --request templates/specs/image-patches.json --parquet '.data/patches/patches-*.parquet' \
	  --model_id image-patches --model_dir .data/models --overwrite
	$(BIN)/python -m tests.demo recall .data/patches .data/models/image-patches

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# An sdist and a wheel, installed into a clean environment and imported from there.
dist: $(READY)
	rm -rf dist build/clean
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip install --quiet --constraint .ci/constraints.txt dist/*.whl
	cd build && clean/bin/python -c "import pipelines.train, transforms.opensearch, transforms.training"
	cd build && clean/bin/knn-train --help > /dev/null
	@echo "dist: $$(ls dist | tr '\n' ' ')installed and imported"

# Brings up a Flink cluster and an OpenSearch node, trains on them what it trains locally, breaks them, ends them.
flink: $(READY)
	CI=true $(BIN)/python -m pytest -v -rP --show-capture=stdout tests/test_flink.py

# Builds the templates' images and runs them, on Flink too. Takes root and a Docker daemon, or dockerd and debootstrap.
images: $(READY)
	$(BIN)/python -m pytest -v -rP --show-capture=stdout tests/images.py

benchmarks: $(READY)
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf .venv .cache .data build dist *.egg-info

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[test,aws]'
	touch $(READY)
