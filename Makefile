# A fresh machine needs Python 3.11 or newer, pip, make and git; all else goes into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell command -v $(name))))
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_TO_TEST := $(VENV)/.ready-to-test

FASHION := data/fashion_mnist
FASHION_FILES := $(addsuffix .gz,train-images-idx3-ubyte train-labels-idx1-ubyte \
	t10k-images-idx3-ubyte t10k-labels-idx1-ubyte)

# The core and contrib alone: no Ray, no data sets of TFDS, no documentation, browser, second process, notebook or binary.
FAST := architecture bottleneck coordinate drawing gradinit graph growth growth_neurons growth_schedule initializer \
	isomorphism measure messages neuron_groups parametrize paths predict report residual rules search sharpness spaces \
	tracing transform vertex_features width zoo
FAST_TESTS := $(wildcard $(patsubst %,tests/test_%.py,$(FAST)))

.PHONY: help run test test-fast lint docs chromium bench test-oldest test-pinned test-newest dist test-dist data clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 20

run: $(READY)  ## rates tuned on a small network, at a deep and a wide one: a table and a figure
	$(PY) -m experiments.tune_small --workdir=runs/tune_small

test: $(READY_TO_TEST) chromium  ## lint, types, the docs and the whole test suite
	$(MAKE) --jobs=2 --output-sync --no-print-directory lint docs
	$(PY) -m pytest

test-fast: lint  ## lint, types, and the tests of the core and contrib: three minutes on two cores
	$(PY) -m pytest $(FAST_TESTS)

lint: $(READY_TO_TEST)  ## ruff, pyright and import-linter; warnings are errors
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --warnings
	$(VENV)/bin/lint-imports --no-cache

docs: $(READY_TO_TEST)  ## the documentation site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "the site: build/site/index.html"

# Any Chromium on the PATH serves. Where it cannot be installed, its test is skipped, or fails if CI is set.
chromium:  ## the browser of the tests, by apt-get as root where there is none
	@if command -v chromium || command -v chromium-browser; then exit 0; fi >/dev/null; \
	if test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null; then \
		echo "no chromium, and no root with apt-get to install it"; exit 0; fi; \
	echo "Installing chromium by apt-get; this takes half a minute."; \
	mkdir -p build; export DEBIAN_FRONTEND=noninteractive; get="apt-get -q -o DPkg::Lock::Timeout=120"; \
	for attempt in 1 2 3; do \
		if { $$get update && $$get install -y --no-install-recommends chromium; } >build/chromium.log 2>&1; \
			then exit 0; fi; sleep 5; done; \
	tail -n 3 build/chromium.log; echo "chromium was not installed"

bench: $(READY_TO_TEST)  ## the benchmarks; tables and benchmarks/results/*.json
	$(PY) -m benchmarks.paths
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.initialization
	$(PY) -m benchmarks.lr_cost
	$(PY) -m benchmarks.measured_groups
	$(PY) -m benchmarks.cell_cost
	$(PY) -m benchmarks.gradinit_cost
	$(PY) -m benchmarks.trace

# The stamps are written last: an interrupted installation is made anew. Binaries need half of what tests do.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3; use make PYTHON=…" >&2; exit 1; }
	@echo "Installing into $(VENV), 0.9 GB; this takes a minute or two."
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[experiments]'
	touch $(READY)

$(READY_TO_TEST): $(READY)
	@echo "Installing what the tests need, 1 GB; this takes a minute or two."
	$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	touch $(READY_TO_TEST)

# Other versions, and with PYTHON=python3.13 another Python, in an environment of their own below
# build/; with TESTS='tests/test_rules.py …' a part of the tests, with FAST_ONLY=1 those of test-fast.
test-oldest:  ## the tests with the oldest versions that pyproject.toml accepts
test-pinned:  ## the tests with those of constraints.txt, for another PYTHON
test-newest:  ## the tests with the newest that the package index has
test-oldest test-pinned test-newest: test-%: build/%.txt
	$(PYTHON) -m venv --clear build/$*
	build/$*/bin/python -m pip install --disable-pip-version-check --quiet -c $< -e '.[test]'
	build/$*/bin/python -m pip freeze --exclude-editable > build/$*-tested.txt
	build/$*/bin/python -m pytest $(or $(TESTS),$(if $(FAST_ONLY),$(FAST_TESTS)))

build/oldest.txt: pyproject.toml
	@mkdir -p build
	sed -n '/^dependencies/,/^\[tool/p' $< | grep -oE '"[^"]+>=[^"]+"' \
		| sed -E 's/"([^[>]+)(\[.*\])?>=(.*)"/\1==\3/' > $@

build/pinned.txt: constraints.txt
	@mkdir -p build
	cp $< $@

build/newest.txt:
	@mkdir -p build
	touch $@

dist: $(READY_TO_TEST)  ## the wheel and the source distribution, into dist/
	rm -rf dist
	$(PY) -m hatchling build -d dist

# With PYTHON=python3.13 another Python. Nothing of the checkout is imported.
test-dist: dist  ## the README's ten lines, by the wheel in an environment of its own
	$(PYTHON) -m venv --clear build/dist
	build/dist/bin/python -m pip install --disable-pip-version-check --quiet "$$(echo dist/*.whl)[models,plot]"
	sed -n '/^```python/,/^```/{//!p}' README.md > build/dist/readme.py
	cd build/dist && bin/python -W error readme.py && test -s network.png

# Debian's package needs no root to download and unpack. It is unpacked beside its place first.
data:  ## Fashion-MNIST from Debian's package, into data/fashion_mnist
	@if test "$$(cd $(FASHION) 2>/dev/null && ls $(FASHION_FILES) 2>/dev/null | wc -l)" = 4; then \
		echo "$(FASHION) is complete"; exit 0; fi; \
	if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then \
		echo "apt-get and dpkg are not here; put the IDX files into $(FASHION) by hand:" >&2; \
		echo "$(FASHION_FILES)" >&2; exit 1; fi; \
	mkdir -p $(FASHION); scratch=$$(mktemp -d data/unpacking.XXXXXX); trap 'rm -rf "$$scratch"' EXIT; \
	get="apt-get -q -o APT::Sandbox::User=root download dataset-fashion-mnist"; \
	(cd "$$scratch"; $$get || { apt-get -q update; $$get; }; dpkg -x dataset-fashion-mnist_*.deb .); \
	mv "$$scratch"/usr/share/datasets/fashion-mnist/*.gz $(FASHION)/; \
	echo "$(FASHION) is complete"

clean:  ## remove caches and builds; keep .venv, data and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
