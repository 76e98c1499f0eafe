# What a person types. `make demo` and `make ui` work on a fresh clone with Python 3.11 and make, without a compiler.
PYTHON ?= python3
FRESH ?= demo test
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
DEMO := $(CURDIR)/examples/demo/corpus.yaml
INSTALLED_KB := 2500000 # as `make fresh` printed, and room for the demo
export DAGSTER_HOME := $(CURDIR)
export HF_HUB_OFFLINE := 1

.PHONY: demo study ui test lint test-services test-benchmarks audit gpu faults fresh autoencoder clean
.DEFAULT_GOAL := demo

# locked/ has the hash of each file and lists all that is needed, so nothing is resolved and nothing pulls another torch.
$(VENV)/ui: pyproject.toml constraints.txt locked/ui.txt
	@$(PYTHON) -c "import ensurepip" 2> /dev/null || { echo "$(PYTHON) with venv is needed here: apt install python3-venv"; exit 1; }
	@test -w . || { echo "$(CURDIR) cannot be written by this user: copy the checkout to a folder that can"; exit 1; }
	@df -Pk . | awk 'NR == 2 && $$4 < $(INSTALLED_KB) { print "$(CURDIR) has " int($$4 / 1000) " MB free, and the install takes " \
	  int($(INSTALLED_KB) / 1000) ": make room there, or copy the checkout elsewhere"; exit 1 }'
	@exec 9> $(VENV).lock; $(PYTHON) -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)" 2> /dev/null || \
	  { echo "another make installs in $(CURDIR): wait until it has ended, then make again"; exit 1; }; set -ex; \
	$(PYTHON) -m venv $(VENV); \
	$(INSTALL) --no-deps --require-hashes -r locked/ui.txt; \
	$(INSTALL) -c constraints.txt torch; \
	$(INSTALL) --no-deps --no-build-isolation -e .; \
	touch $@

$(VENV)/test: $(VENV)/ui locked/test.txt
	$(INSTALL) --no-deps --require-hashes -r locked/test.txt
	touch $@

$(VENV)/services: $(VENV)/test locked/services.txt
	$(INSTALL) --no-deps --require-hashes -r locked/services.txt
	touch $@

audit: ## known vulnerabilities of every package in constraints.txt, by pip-audit where it is installed
	@command -v pip-audit > /dev/null || { echo "pip-audit is not installed here: 'pipx install pip-audit', then 'make audit' again"; exit 1; }
	pip-audit --strict --disable-pip --no-deps -r constraints.txt # strict: one that its database lacks is an error, not a pass

demo: $(VENV)/ui ## the whole graph on a small labelled corpus, through Dagster
	NEXTVID_CORPUS="$(DEMO)" $(BIN)/python -m examples.demo

study: $(VENV)/ui ## what masks, moving average and parts do: at most three hours, goes on where it was; QUICK=--quick
	$(BIN)/python -m examples.study.run $(QUICK)

ui: $(VENV)/ui ## the Dagster UI on the demo's instance
	NEXTVID_CORPUS="$(DEMO)" $(BIN)/dagster dev

test: $(VENV)/test ## fast tests, as an ordinary user, without a network
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not services and not faults and not benchmarks and not fresh"

lint: $(VENV)/test ## format, style, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-services: $(VENV)/services ## live daemon, Postgres, Ray and other servers; what is absent is skipped and named
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "services and not faults" -W ignore::pytest.PytestUnraisableExceptionWarning # dagster-ray leaves event loops open

test-benchmarks: $(VENV)/test ## each benchmark's quick run, 4 minutes
	$(BIN)/python -m pytest -q -m benchmarks

gpu: $(VENV)/test ## what only a GPU can show, under ten minutes
	$(BIN)/python -m benchmarks.gpu

faults: $(VENV)/services ## try every promise, slow proofs too, and write docs/reliability.md; less: NEXTVID_TRIES=20 LESS="--minutes 15"
	$(BIN)/python -m tests.reliability $(LESS)

fresh: $(VENV)/test ## the demo and the tests in a fresh Debian, by debootstrap as root; FRESH=.venv/ui installs alone
	FRESH="$(FRESH)" $(BIN)/python -m pytest -q -s -m fresh tests/test_fresh.py

autoencoder: $(VENV)/ui ## train the demo autoencoder again
	$(BIN)/python -m examples.demo.train_autoencoder data/demo/autoencoder_corpus examples/demo/autoencoder

clean: ## the demo's data and history, nobody else's
	rm -rf data/demo data/dagster
