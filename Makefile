# Build, gate and benchmarks. `make help` lists the targets.
#
# PYTHON is any interpreter >= 3.11; everything Python is installed into .venv. Suites are run by
# tools/suites.py as NAME:BUDGET_SECONDS:COMMAND, which stops each one at three times its budget.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
SECONDS_EACH ?= 60
SUITE ?= nbd
ISSUE ?= 3
ARGS ?=
IMG ?=
CMD ?= ndctl list -BDRNi
LABEL ?= auto

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
SUITES := $(PY) tools/suites.py

.PHONY: help build planted pageless peers-demo peers-test peers-bench peers-guest demo guest test check bench fuzz soak soak-tests soak-fuzz clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

# --- build ---------------------------------------------------------------------------------------

# A virtual environment without ensurepip (Debian without python3-venv) is filled by the pip outside.
$(STAMP): pyproject.toml tools/requirements.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "make: PYTHON=$(PYTHON) is older than 3.11" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --without-pip $(VENV)
	mkdir -p build
	$(PY) tools/requirements.py > build/requirements.txt
	outer=$$(command -v $(PYTHON)); \
	if $(PY) -m pip --version > /dev/null 2>&1; then \
	    pip="$(PY) -m pip"; else pip="$$outer -m pip --python $(PY)"; fi; \
	export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	$$pip install --quiet --requirement build/requirements.txt; \
	$$pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

build: $(STAMP) ## virtual environment and release build of the Rust core
	PYTHON=$(CURDIR)/$(PY) tools/build-native

planted: $(STAMP) ## the core with planted durability faults, under build/planted
	PYTHON=$(CURDIR)/$(PY) tools/build-native --planted

pageless: $(STAMP) ## the core that ends where it would make a page map, under build/no-page-map
	PYTHON=$(CURDIR)/$(PY) tools/build-native --no-page-map

# --- what a user sees ----------------------------------------------------------------------------

peers-demo peers-test peers-bench peers-guest: peers-%:
	@$(PYTHON) tools/peers.py install --for $*

demo: peers-demo build ## an image, a file system on it, real clients, every byte compared
	$(PY) tools/demo.py $(ARGS)

# CMD and IMG reach the shell as they were given, so that their quotes and dollars stay theirs.
guest: override export IMG := $(value IMG)
guest: override export CMD := $(value CMD)
guest: peers-guest ## make guest IMG=a.img[,b.img] CMD='ndctl list -RNi' [LABEL=128K]: a real kernel
	@$(PYTHON) tools/guest.py run --images "$$IMG" --label-size "$(LABEL)" -- "$$CMD"

# Where the package is not to be had, the suite says what it left out.
bench: peers-bench build ## make bench SUITE=nbd|medium|formats|btt|cache|wear|policy|frames|tiers|dax [ARGS=--quick]
	if test $(SUITE) = cache && ! $(PY) -c 'import libcachesim' 2> /dev/null; then \
	    $(PYTHON) -m pip --python $(PY) install --quiet --no-deps \
	        "$$($(PY) tools/requirements.py bench)" || true; fi
	mkdir -p build/bench
	$(PY) -m pmemkit.bench.$(SUITE) --json build/bench/$(SUITE).json $(ARGS)

# --- the gate ------------------------------------------------------------------------------------

CARGO_TEST := cargo test --quiet --locked --package pmemkit-core
# What has a suite of its own, because it prints counts that somebody wants to see.
UNITS := -- --skip explore::
EXPLORE := explore:: -- --nocapture --test-threads 1
LOOM := --features model-check model:: -- --nocapture --test-threads 1

# Storage in a build in which making a page map ends the process: all of it takes a minute and more,
# so make test has what opens media and sectors and serves them, and make soak the rest.
PAGELESS := export PYTHONPATH=build/no-page-map; \
	        $(PY) -c "from pmemkit import _native; assert _native.NO_PAGE_MAP" && \
	        $(PY) -m pytest -q -m "not peer and not soak" \
	        tests/memory/test_no_page_map.py tests/media
PAGELESS_SOME := tests/storage/test_btt_reader.py tests/storage/test_defaults.py \
	        tests/storage/test_cache.py tests/serve/test_nbd_server.py

# The guest waits for its emulated CPU, the other tests for processes: together they take the time of
# the longer half. The guest's results follow when both are there.
SIDE_BY_SIDE = mkdir -p build; \
	        $(PY) -m pytest -q tests/kernel > build/kernel.log 2>&1 & kernel=$$!; \
	        status=0; $(PY) -m pytest -q --ignore tests/kernel || status=$$?; \
	        wait $$kernel || status=$$?; cat build/kernel.log; exit $$status

test: peers-test build ## everything, with every peer there is
	$(SUITES) \
	    'rust:90:$(CARGO_TEST) $(UNITS)' \
	    'crash exploration:90:$(CARGO_TEST) $(EXPLORE)' \
	    'loom:90:$(CARGO_TEST) $(LOOM)' \
	    'planted build:60:PYTHON=$(CURDIR)/$(PY) tools/build-native --planted' \
	    'no page map:60:PYTHON=$(CURDIR)/$(PY) tools/build-native --no-page-map \
	        && { $(PAGELESS) $(PAGELESS_SOME); }' \
	    'python and kernel:720:$(SIDE_BY_SIDE)' \
	    'fuzz proof:40:tools/fuzz prove' \
	    'fuzz request parser:40:tools/fuzz run request_parser 20' \
	    'fuzz connection:40:tools/fuzz run connection 20' \
	    'fuzz options:40:$(PY) fuzz/options_fuzz.py --seconds 20' \
	    'fuzz labels:40:$(PY) fuzz/formats_fuzz.py --target labels --seconds 15' \
	    'fuzz btt:40:$(PY) fuzz/formats_fuzz.py --target btt --seconds 15' \
	    'fuzz infoblock:40:$(PY) fuzz/formats_fuzz.py --target infoblock --seconds 15'

check: build ## what needs no peers: formats, lints, types, stubs, tidy, unit tests
	$(SUITES) \
	    'rustfmt:10:cargo fmt --all --check && cargo fmt --manifest-path fuzz/Cargo.toml --check' \
	    'fuzz lock:10:cargo metadata --quiet --locked --format-version 1 \
	        --manifest-path fuzz/Cargo.toml > /dev/null' \
	    'clippy:60:cargo clippy --quiet --locked --workspace --all-targets -- -D warnings' \
	    'ruff format:10:$(BIN)/ruff format --check src tests tools fuzz' \
	    'ruff:10:$(BIN)/ruff check src tests tools fuzz' \
	    'mypy:60:$(BIN)/mypy && $(BIN)/mypy --explicit-package-bases tools/*.py' \
	    'stubtest:30:$(PY) tools/stubs.py' \
	    'docs:20:$(PY) tools/docs_formats.py --check' \
	    'tidy:20:$(PY) tools/tidy.py' \
	    'rust units:90:$(CARGO_TEST) $(UNITS)' \
	    'python units:240:$(PY) -m pytest -q -m "not peer and not soak"'

fuzz: $(STAMP) ## the fuzzers, SECONDS_EACH=60 each
	$(SUITES) --patience 2 \
	    'fuzz request parser:$(SECONDS_EACH):tools/fuzz run request_parser $(SECONDS_EACH)' \
	    'fuzz connection:$(SECONDS_EACH):tools/fuzz run connection $(SECONDS_EACH)' \
	    'fuzz options:$(SECONDS_EACH):$(PY) fuzz/options_fuzz.py --seconds $(SECONDS_EACH)' \
	    $(foreach each,labels btt infoblock,'fuzz $(each):$(SECONDS_EACH):$(PY) \
	        fuzz/formats_fuzz.py --target $(each) --seconds $(SECONDS_EACH)')

soak: soak-tests soak-fuzz ## full counts and 600 s of each fuzzer; output kept in docs/evidence

soak-tests: peers-test build planted pageless ## every test with the counts that the issues ask for
	mkdir -p docs/evidence
	PMEMKIT_SOAK=1 $(SUITES) \
	    'rust:300:$(CARGO_TEST) --release $(UNITS)' \
	    'crash exploration:600:$(CARGO_TEST) --release $(EXPLORE)' \
	    'loom:120:$(CARGO_TEST) --release $(LOOM)' \
	    'no page map:200:unset PMEMKIT_SOAK; $(PAGELESS) tests/storage tests/serve' \
	    'python:1800:$(PY) -m pytest -q --timeout 1800 --ignore tests/kernel' \
	    'kernel:900:$(PY) -m pytest -q tests/kernel' \
	    2>&1 | tee docs/evidence/issue-$(ISSUE)-soak-tests.txt

# Side by side: nothing is measured here but whether something breaks.
soak-fuzz: $(STAMP) ## 600 s of each fuzzer
	mkdir -p docs/evidence
	$(SUITES) \
	    'fuzzers:900:tools/fuzz run request_parser 600 & parser=$$!; \
	        tools/fuzz run connection 600 & connection=$$!; \
	        $(PY) fuzz/options_fuzz.py --seconds 600; \
	        wait $$parser; wait $$connection' \
	    'fuzzers of formats:1500:$(PY) fuzz/formats_fuzz.py --target labels --seconds 600 & \
	        labels=$$!; $(PY) fuzz/formats_fuzz.py --target btt --seconds 600; wait $$labels; \
	        $(PY) fuzz/formats_fuzz.py --target infoblock --seconds 600' \
	    2>&1 | tee docs/evidence/issue-$(ISSUE)-soak-fuzz.txt

clean: ## everything that was built
	rm -rf build target fuzz/target $(VENV) src/pmemkit/_native.abi3.so
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests tools fuzz -name __pycache__ -type d -prune -exec rm -rf {} +
