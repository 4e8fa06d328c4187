# make quick     set up and compare the methods on Hopper
# make test      set up and run the fast tests
# make test-all  the fast tests and what is marked slow, slurm or robosuite, with the optional simulators installed

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_ALL := $(VENV)/.ready-all
COMMA := ,
WORKERS ?= 2
PARALLEL = $(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile

.PHONY: quick test test-all lint clean

# not into results/quick: the committed runs there count as done, and nothing would be run
quick: $(READY)
	$(RUN) -m benchmark.run --suite quick --out runs/quick

test: lint
	$(PARALLEL) -m "not slow and not slurm and not robosuite"

test-all: $(READY_ALL)
	$(MAKE) test
	$(PARALLEL) -m "(slow or robosuite) and not slurm"
	$(RUN) -m pytest -m slurm --durations=0 --durations-min=1

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

# uv where there is one, else venv and pip; constraints.txt holds the versions that were tested together
define install
@if command -v uv >/dev/null 2>&1; then \
	uv venv --quiet --allow-existing --python "$(PYTHON)" $(VENV) && \
	uv pip install --quiet --python $(RUN) --constraint constraints.txt $(1); \
else \
	"$(PYTHON)" -m venv $(VENV) && \
	$(RUN) -m pip install --quiet --constraint constraints.txt $(1); \
fi
endef

$(READY): pyproject.toml constraints.txt
	$(call install,--editable ".[test]")
	@touch $@

# d4rl and robomimic are read by tests alone, as references; what they depend on no longer installs
$(READY_ALL): $(READY)
	$(call install,--editable ".[test$(COMMA)robosuite$(COMMA)robomimic$(COMMA)minari$(COMMA)video$(COMMA)export]")
	$(call install,--no-deps d4rl==1.1 robomimic==0.3.0)
	@touch $@

clean:
	rm -rf $(VENV)
