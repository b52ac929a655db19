# Two commands for everybody: `make serve` and `make test`. Each does its own set-up; what is there already is not done again.
# Needed on a fresh Debian or Ubuntu: python3 (3.11 or later) with venv, make, gcc. With python3-dev the gateway is compiled.

SHELL := /bin/bash
PYTHON ?= python3
export PENSTOCK_HOME := $(CURDIR)
PIP := --disable-pip-version-check --quiet --no-input
# Lines of a pip that is set up with folders that lack some packages; they say nothing about ours.
FILTER := 2> >(grep -v '^WARNING: Location' >&2)

# What goes into the wheel; folders too, so that a file that went away is noticed.
SOURCES := $(shell find gateway backends middleware openapi -name __pycache__ -prune -o -print) scripts/compile.py pyproject.toml
# -P and importlib: the installed packages are tested, not those of the current folder.
COMPILED = .venv-compiled/bin/python -P
COMPILED_TESTS = --import-mode=importlib --form compiled

# Several at a time: these mostly wait, for sockets and processes. Of those with engines three, each file's in one process, since an engine
# starts once for a file. A storm has the machine to itself.
# With ARGS="-k ..." some of these may have nothing to do: that (exit code 5) is no failure then.
NONE_IS_FINE = $(if $(ARGS),|| [ $$? = 5 ])
SEVERAL = -n 5 --dist worksteal
NO_ENGINE = not engine and not storm and not conformance

.PHONY: serve test test-fast test-pure test-compiled conformance check fix sbom audit bench bench-quick bench-stages bench-litellm bench-soak lock engine apt clean help

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

serve: .venv/ready engine ## serve http://127.0.0.1:8000/v1 with the embedded engine
	@exec .venv/bin/penstock serve $(ARGS)

# What is served is compiled where that can be, so this is what is tested; what can differ in the other form is found by the unit tests, which
# are run in both, and by test-pure.
test: .venv-dev/ready .venv-compiled/ready .venv-transfer/ready engine node apt ## everything, the real engine included
	$(COMPILED) -m pytest $(COMPILED_TESTS) -m "$(NO_ENGINE)" $(SEVERAL) $(ARGS) $(NONE_IS_FINE)
	.venv-dev/bin/python -m pytest -m "(unit and not once or pure) and $(NO_ENGINE)" $(SEVERAL) $(ARGS) $(NONE_IS_FINE)
	.venv-dev/bin/python -m pytest -m "engine and not storm" -n 3 --dist loadfile $(ARGS) $(NONE_IS_FINE)
	.venv-dev/bin/python -m pytest -m storm $(ARGS) $(NONE_IS_FINE)

test-pure: .venv-dev/ready node apt ## what make test runs in the compiled form alone, once more in pure Python
	.venv-dev/bin/python -m pytest -m "not unit and not pure and $(NO_ENGINE)" $(SEVERAL) $(ARGS)

test-compiled: .venv-compiled/ready node apt ## what needs no engine and no patience, on the compiled form
	$(COMPILED) -m pytest $(COMPILED_TESTS) -m "$(NO_ENGINE) and not slow" $(SEVERAL) $(ARGS)

test-fast: .venv-dev/ready node apt ## what needs no engine, kills nothing and takes no patience
	.venv-dev/bin/python -m pytest -m "$(NO_ENGINE) and not chaos and not slow" $(SEVERAL) $(ARGS)

CLIENTS = .venv-clients/newest/ready .venv-clients/openai2/ready .venv-clients/suite/source/ready

conformance: .venv-dev/ready $(CLIENTS) engine node apt ## today's clients and openai-python's own tests, over a gateway before the real engine
	.venv-dev/bin/python -m pytest -m conformance $(ARGS)

check: .venv-dev/ready ## format, lint, types, import rules, generated files
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/ruff check .
	.venv-dev/bin/mypy
	.venv-dev/bin/lint-imports
	.venv-dev/bin/python scripts/compile.py --check
	.venv-dev/bin/python -m openapi --check
	.venv-dev/bin/python scripts/check_docs.py
	.venv-dev/bin/python -m scripts.dashboards --check
	.venv-dev/bin/python -m scripts.observability --check
	.venv-dev/bin/python -m scripts.settings --check
	.venv-dev/bin/python -m scripts.capacity --check
	.venv-dev/bin/python -m scripts.licences

fix: .venv-dev/ready ## format, repair what can be repaired by itself, write generated files
	.venv-dev/bin/python -m openapi
	.venv-dev/bin/python -m scripts.dashboards
	.venv-dev/bin/python -m scripts.observability
	.venv-dev/bin/python -m scripts.settings
	.venv-dev/bin/python -m scripts.capacity
	.venv-dev/bin/ruff format .
	.venv-dev/bin/ruff check --fix .

sbom: .venv-supply/ready ## build/sbom-*.json: what the gateway and the CPU engine are made of (CycloneDX 1.6), from the lock files
	@mkdir -p build
	.venv-supply/bin/cyclonedx-py requirements requirements/gateway.txt --output-reproducible -o build/sbom-gateway.json
	.venv-supply/bin/cyclonedx-py requirements backends/sglang_dsv3/engine/lock-cpu.txt --output-reproducible -o build/sbom-engine-cpu.json

# Strict: what cannot be looked up has not been audited, and is no success.
audit: .venv-supply/ready ## known vulnerabilities of what is locked; needs pypi.org
	.venv-supply/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r requirements/gateway.txt

# What is measured is the gateway of `make serve`, .venv; ARGS="--python PATH" measures another environment's.
PEERS = .venv/ready .venv-compiled/ready .venv-bench/smg/ready .venv-bench/sglang-router/ready

bench: $(PEERS) engine ## what a request costs beside other gateways, against the targets; tokens per second
	@scripts/apt.sh bench
	.venv-dev/bin/python -m bench.gateway $(ARGS)
	.venv-dev/bin/python -m bench.stages
	$(COMPILED) -m bench.balance
	.venv-dev/bin/python -m bench.routing
	$(COMPILED) -m bench.limits
	$(COMPILED) -m bench.telemetry
	.venv-dev/bin/python -m bench.tokens

bench-quick: $(PEERS) ## one round of a second each, to see that the bench runs
	@scripts/apt.sh bench
	.venv-dev/bin/python -m bench.gateway --quick $(ARGS)

bench-stages: .venv-dev/ready .venv-stages/ready ## where the instructions of a request go, in the compiled form
	@scripts/apt.sh bench
	.venv-dev/bin/python -m bench.stages --python .venv-stages/bin/python $(ARGS)

bench-litellm: .venv-bench/litellm/ready ## the environment for `make bench ARGS=--litellm`

bench-soak: .venv/ready .venv-dev/ready ## a million requests and 5,000 open streams
	@scripts/apt.sh bench
	.venv-dev/bin/python -m bench.soak $(ARGS)

lock: ## write the lock files anew from their .in files
	$(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install $(PIP) uv==0.13.9
	cd requirements && ../.venv-lock/bin/uv pip compile -q --generate-hashes --python-version 3.11 --no-annotate --no-header \
	  --constraint constraints.txt -o gateway.txt gateway.in
	cd requirements && ../.venv-lock/bin/uv pip compile -q --generate-hashes --python-version 3.11 --no-annotate --no-header \
	  --override overrides.txt -o dev.txt dev.in
	cd requirements && ../.venv-lock/bin/uv pip compile -q --generate-hashes --python-version 3.11 --no-annotate --no-header \
	  -o supply.txt supply.in
	cd requirements && for group in newest openai2 suite; do ../.venv-lock/bin/uv pip compile -q --generate-hashes \
	  --python-version 3.11 --no-annotate --no-header -o clients-$$group.txt clients-$$group.in || exit 1; done
	cd requirements && for peer in smg sglang-router litellm; do ../.venv-lock/bin/uv pip compile -q --generate-hashes \
	  --python-version 3.11 --no-annotate --no-header --override bench-overrides.txt -o bench-$$peer.txt bench-$$peer.in || exit 1; done
	cd requirements && ../.venv-lock/bin/uv pip compile -q --no-deps --generate-hashes --python-version 3.11 --no-annotate --no-header \
	  -o transfer.txt transfer.in
	cd backends/sglang_dsv3/engine && ../../../.venv-lock/bin/uv pip compile -q --no-deps --generate-hashes --python-version 3.11 \
	  --universal --no-annotate --no-header -o lock-cpu.txt lock-cpu.in

engine: .venv/ready ## the engine's environment
	@.venv/bin/penstock engine install

apt:
	@scripts/apt.sh

node: .venv-dev/node-ready

.venv/packages: requirements/gateway.txt
	@echo "penstock: installing the gateway's environment (about 50 MB of wheels)"
	@$(PYTHON) -m venv .venv || { echo "penstock: python3-venv is missing? apt-get install python3-venv"; exit 1; }
	@.venv/bin/pip install $(PIP) --no-deps --require-hashes -r requirements/gateway.txt $(FILTER)
	@touch $@

.venv/ready: .venv/packages $(SOURCES)
	@rm -rf build/wheel && HATCH_QUIET=1 .venv/bin/python -m hatchling build -t wheel -d build/wheel
	@.venv/bin/pip install $(PIP) --no-deps --force-reinstall build/wheel/*.whl $(FILTER)
	@touch $@

.venv-dev/ready: requirements/dev.txt pyproject.toml
	@echo "penstock: installing the tests' environment (about 170 MB of wheels)"
	@$(PYTHON) -m venv .venv-dev || { echo "penstock: python3-venv is missing? apt-get install python3-venv"; exit 1; }
	@.venv-dev/bin/pip install $(PIP) --no-deps --require-hashes -r requirements/dev.txt $(FILTER)
	@.venv-dev/bin/pip install $(PIP) --no-deps --no-build-isolation -e . $(FILTER)
	@touch $@

# The tests' environment with the compiled wheel in place of the sources. The path to the checkout comes last: tests/ and bench/ are there.
define with-compiled
	@rm -rf $(1) build/wheel-$(1)
	@HATCH_QUIET=1 PENSTOCK_FORM=compiled .venv-dev/bin/python -m hatchling build -t wheel -d build/wheel-$(1)
	@$(PYTHON) -m venv --without-pip $(1)
	@.venv-dev/bin/pip --python $(1)/bin/python install $(PIP) --no-deps build/wheel-$(1)/*.whl $(FILTER)
	@printf '%s\n' $(CURDIR)/.venv-dev/lib/python*/site-packages $(CURDIR) > $$(echo $(1)/lib/python*/site-packages)/tests.pth
	@touch $(1)/ready
endef

.venv-compiled/ready: .venv-dev/ready $(SOURCES)
	$(call with-compiled,.venv-compiled)

# The same, with a call at the beginning and end of each function of ours, by which bench/marks.c tells stages apart.
.venv-stages/ready: export CFLAGS = -finstrument-functions -finstrument-functions-exclude-file-list=lib-rt,/include/
.venv-stages/ready: .venv-dev/ready $(SOURCES)
	$(call with-compiled,.venv-stages)

.venv-supply/ready: requirements/supply.txt
	@echo "penstock: installing what writes the SBOM and asks for vulnerabilities"
	@$(PYTHON) -m venv .venv-supply
	@.venv-supply/bin/pip install $(PIP) --no-deps --require-hashes -r $< $(FILTER)
	@touch $@

.venv-transfer/ready: requirements/transfer.txt .venv-dev/ready
	@echo "penstock: installing what hands KV caches over in tests (46 MB)"
	@.venv-dev/bin/pip install $(PIP) --no-deps --require-hashes --target $(@D) -r $< $(FILTER)
	@touch $@

# Clients in tests, each group with what it needs and apart from what the tests need.
.venv-clients/%/ready: requirements/clients-%.txt
	@echo "penstock: installing clients for the tests: $* (some 60 MB of wheels)"
	@$(PYTHON) -m venv .venv-clients/$*
	@.venv-clients/$*/bin/pip install $(PIP) --no-deps --require-hashes -r $< $(FILTER)
	@touch $@

# openai-python's own tests are in its source distribution alone.
.venv-clients/suite/source/ready: requirements/clients-suite-source.txt .venv-clients/suite/ready .venv-dev/ready
	@rm -rf $(@D) && mkdir -p $(@D)
	@.venv-dev/bin/pip download $(PIP) --no-deps --no-binary :all: --no-build-isolation --require-hashes -r $< -d $(@D) $(FILTER)
	@tar -xzf $(@D)/*.tar.gz -C $(@D) --strip-components=1
	@touch $@

.venv-bench/%/ready: requirements/bench-%.txt
	@echo "penstock: installing $* to measure beside"
	@$(PYTHON) -m venv .venv-bench/$*
	@.venv-bench/$*/bin/pip install $(PIP) --no-deps --require-hashes -r $< $(FILTER)
	@touch $@

.venv-dev/node-ready: .venv-dev/ready tests/node/package-lock.json
	@echo "penstock: installing openai-node for the tests"
	@scripts/npm.sh ci --prefix tests/node --silent --no-audit --no-fund
	@touch $@

clean: ## forget every environment, checkpoint and state
	rm -rf .venv .venv-dev .venv-compiled .venv-stages build .venv-engine .venv-lock .venv-bench .venv-clients .venv-supply .venv-transfer checkpoints state tests/node/node_modules
