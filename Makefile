# make quick     set up and compare the methods on Hopper
# make test      set up and run the fast tests
# make test-all  the fast tests and what is marked slow, slurm or robosuite

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: quick test test-all lint clean

quick: $(READY)
	$(RUN) -m benchmark.run --suite quick

test: lint
	$(RUN) -m pytest -m "not slow and not slurm and not robosuite"

test-all: lint
	$(RUN) -m pytest

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

# uv where there is one, else venv and pip; constraints.txt holds the versions that were tested together
$(READY): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python "$(PYTHON)" $(VENV) && \
		uv pip install --quiet --python $(RUN) --constraint constraints.txt --editable ".[test]"; \
	else \
		"$(PYTHON)" -m venv $(VENV) && \
		$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[test]"; \
	fi
	@touch $@

clean:
	rm -rf $(VENV)
