# What a person types. `make demo` and `make ui` work on a fresh clone with Python 3.11 and make, without a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
DEMO := $(CURDIR)/examples/demo/corpus.yaml
export DAGSTER_HOME := $(CURDIR)
export HF_HUB_OFFLINE := 1

.PHONY: demo study ui test lint test-services test-benchmarks gpu faults autoencoder clean
.DEFAULT_GOAL := demo

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt torch
	touch $@

# torch stands first and alone, so that nothing that follows can pull another build of it.
$(VENV)/ui: $(VENV)/torch pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e ".[ui]"
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e ".[ui,test]"
	touch $@ $(VENV)/ui

$(VENV)/services: $(VENV)/test
	$(INSTALL) -c constraints.txt -e ".[ui,test,ray,postgres,kubernetes,services]"
	touch $@

demo: $(VENV)/ui ## the whole graph on a small labelled corpus, through Dagster
	NEXTVID_CORPUS=$(DEMO) $(BIN)/python -m examples.demo

study: $(VENV)/ui ## what masks, moving average and parts do: at most three hours, goes on where it was; QUICK=--quick
	$(BIN)/python -m examples.study.run $(QUICK)

ui: $(VENV)/ui ## the Dagster UI on the demo's instance
	NEXTVID_CORPUS=$(DEMO) $(BIN)/dagster dev

test: $(VENV)/test ## fast tests, as an ordinary user, without a network
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not services and not faults and not benchmarks"

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

faults: $(VENV)/test ## slow proofs of crash safety
	$(BIN)/python -m pytest -q -m faults

autoencoder: $(VENV)/ui ## train the demo autoencoder again
	$(BIN)/python -m examples.demo.train_autoencoder data/demo/autoencoder_corpus examples/demo/autoencoder

clean: ## the demo's data and history, nobody else's
	rm -rf data/demo data/dagster
