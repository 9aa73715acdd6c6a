# Everything runs in .venv, which the first target that needs it makes.
# KERAS_BACKEND chooses the backend: tensorflow (the default), jax or torch.

PYTHON ?= python3
venv := .venv
constraints := constraints.txt
export KERAS_BACKEND ?= tensorflow
# TensorFlow's start-up notes hide the progress bars.
export TF_CPP_MIN_LOG_LEVEL ?= 2

# Without TensorFlow's notes of its start, which it writes before it reads the level.
quietly := 2> >(grep -vE "^(WARNING: All log messages before absl|[IWE]0000 )" >&2)
SHELL := bash

bin := $(venv)/bin
pip := $(bin)/python -m pip install --quiet --no-compile \
	$(if $(constraints),--constraint $(constraints))
pytest := $(bin)/python -m pytest --quiet --numprocesses 2 --dist worksteal
# What `make test` leaves to `make test-all`.
select ?= -m "not thorough"

.PHONY: help demo examples test test-all test-matrix test-oldest test-newest \
	test-version test-peers peers lint bench bench-devices bench-routers bench-hub \
	docs dist test-dist test-wheel clean

help:
	@echo "make demo        train, save, load and generate: examples/char_lm.py"
	@echo "make examples    the other examples: upcycling, fine_tuning, digits_vit, multi_gate"
	@echo "make test        the tests, on one backend"
	@echo "make test-all    all tests, on all three backends, and files between them"
	@echo "make test-matrix the tests on the oldest and on the newest versions, all backends:"
	@echo "                 make test-oldest, make test-newest"
	@echo "make test-peers  parity with other packages' MoE layers on equal weights"
	@echo "make lint        ruff"
	@echo "make bench       the layer against a dense one and other packages'"
	@echo "make bench-devices  training on several devices against one"
	@echo "make bench-routers  what each router learns in a small language model"
	@echo "make bench-hub   models of keras-hub, as they are and accelerated"
	@echo "make docs        the documentation as a site, in site/"
	@echo "make dist        what is released, wheel and sdist, in dist/"
	@echo "make test-dist   the wheel in empty environments, and the tests of the sdist"

demo: $(venv)/with-$(KERAS_BACKEND) $(venv)/with-plots
	$(bin)/python examples/char_lm.py $(DEMO) $(quietly)

examples: $(venv)/with-$(KERAS_BACKEND) $(venv)/with-examples
	$(bin)/python examples/upcycling.py $(UPCYCLING) $(quietly)
	$(bin)/python examples/fine_tuning.py $(FINE_TUNING) $(quietly)
	$(bin)/python examples/digits_vit.py $(EPOCHS) $(quietly)
	$(bin)/python examples/multi_gate.py $(EPOCHS) $(quietly)

test: $(venv)/with-$(KERAS_BACKEND) $(venv)/with-test
	$(pytest) tests --ignore tests/peers --ignore tests/cross $(select)

test-all: $(venv)/with-onnx $(venv)/with-orbax
	$(MAKE) test select= KERAS_BACKEND=tensorflow
	$(MAKE) test select= KERAS_BACKEND=jax
	$(MAKE) test select= KERAS_BACKEND=torch
	$(bin)/python -m pytest --quiet --numprocesses 2 --dist loadfile tests/cross

test-matrix: test-oldest test-newest

# Each backend in an environment of its own, made anew and removed again: old versions
# of TensorFlow and JAX have no common dependencies.
test-oldest test-newest: test-%:
	$(MAKE) test-version end=$* KERAS_BACKEND=tensorflow
	$(MAKE) test-version end=$* KERAS_BACKEND=jax
	$(MAKE) test-version end=$* KERAS_BACKEND=torch

# Old versions of JAX get wrong numbers from what they compiled and cached on a CPU.
test-version: export JAX_ENABLE_COMPILATION_CACHE := false
# For both, which time nothing; only what every version knows.
test-version bench-devices: export XLA_FLAGS := --xla_backend_optimization_level=0 \
	--xla_llvm_disable_expensive_passes=true
test-version: constraints = $(if $(filter oldest,$(end)),constraints-oldest.txt)
test-version:
	rm -rf .venv-$(end)
	$(MAKE) test venv=.venv-$(end) constraints=$(constraints)
	rm -rf .venv-$(end)

test-peers: $(venv)/with-tensorflow $(venv)/with-jax $(venv)/with-test peers
	$(pytest) tests/peers
	KERAS_BACKEND=jax $(pytest) tests/peers/test_acceleration.py
	KERAS_BACKEND=torch $(pytest) tests/peers/test_acceleration.py

# Some without their many dependencies, of which their MoE layers use none.
peers: $(venv)/with-torch $(venv)/with-peers
	$(pip) --no-deps tf-keras tf-models-official keras-hub

lint: $(venv)/with-lint
	$(bin)/ruff check
	$(bin)/ruff format --check

bench: $(venv)/with-tensorflow $(venv)/with-jax $(venv)/with-plots peers
	KERAS_BACKEND=tensorflow $(bin)/python benchmarks/bench.py
	KERAS_BACKEND=jax $(bin)/python benchmarks/bench.py
	KERAS_BACKEND=torch $(bin)/python benchmarks/bench.py
	$(bin)/python benchmarks/report.py

bench-devices: $(venv)/with-tensorflow $(venv)/with-jax $(venv)/with-torch
	KERAS_BACKEND=tensorflow $(bin)/python benchmarks/devices.py
	KERAS_BACKEND=jax $(bin)/python benchmarks/devices.py
	KERAS_BACKEND=torch $(bin)/python benchmarks/devices.py

# In two hours; it continues where it was stopped.
bench-routers: $(venv)/with-$(KERAS_BACKEND) $(venv)/with-plots
	$(bin)/python benchmarks/routers.py --output docs/benchmarks/routers.json

bench-hub: $(venv)/with-tensorflow $(venv)/with-jax $(venv)/with-plots peers
	KERAS_BACKEND=tensorflow $(bin)/python benchmarks/acceleration.py
	KERAS_BACKEND=jax $(bin)/python benchmarks/acceleration.py
	KERAS_BACKEND=torch $(bin)/python benchmarks/acceleration.py
	$(bin)/python benchmarks/report.py

docs: $(venv)/with-docs
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build

# The wheel is made of the sdist, so that this holds all that it takes.
dist: $(venv)/with-release
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt $(bin)/python -m build
	$(bin)/python -m twine check --strict dist/*

# The wheel in empty environments, with the README's example; the tests of the sdist.
test-dist: dist
	$(MAKE) test-wheel KERAS_BACKEND=tensorflow
	$(MAKE) test-wheel KERAS_BACKEND=jax
	$(MAKE) test-wheel KERAS_BACKEND=torch
	rm -rf dist/unpacked && mkdir dist/unpacked
	tar --extract --file dist/*.tar.gz --directory dist/unpacked --strip-components 1
	$(MAKE) --directory dist/unpacked test

test-wheel:
	rm -rf .venv-wheel
	$(MAKE) .venv-wheel/bin/python venv=.venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt \
		"$(wildcard dist/*.whl)[$(KERAS_BACKEND)]"
	cd dist && sed -n '/^```python/,/^```/ { //!p }' ../README.md \
		| ../.venv-wheel/bin/python -
	rm -rf .venv-wheel dist/model.keras

clean:
	rm -rf .venv .venv-*

$(bin)/python:
	$(PYTHON) -m venv $(venv)

$(venv)/with-%: $(bin)/python setup.cfg $(constraints)
	$(pip) --editable ".[$*]"
	@touch $@
