# Two commands: `make demo` and `make test`. Everything else is below them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Nothing phones out.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE ?= 1

.PHONY: help install dev demo test check proto bench-simulation bench-dp bench-rounds bench-aggregation bench-dropout chaos-long report-picture clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-18s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Consilium needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing Consilium and what it needs into $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

install: $(VENV)/installed ## Make .venv with what a user needs
dev: $(VENV)/installed-dev ## ... and with what a developer needs

demo: $(VENV)/installed ## Four simulated hospitals, the embedded model, under two minutes
	$(BIN)/consilium demo --force

# Several processes share the cores there: one thread each, unless the caller says otherwise.
test bench-simulation bench-dp bench-rounds bench-dropout chaos-long: export OMP_NUM_THREADS ?= 1
test: $(VENV)/installed-dev ## The whole test suite, with coverage
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term

check: $(VENV)/installed-dev ## Format, lint, types, import rule
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: $(VENV)/installed-dev ## Make client/agent_pb2.py from client/agent.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. client/agent.proto

bench-simulation: $(VENV)/installed-dev ## Memory and time of 4, 20 and 50 inline sites
	$(BIN)/python -m simulations.bench.simulation

bench-dp: $(VENV)/installed-dev ## What a DP step costs beside a plain one, in time and memory
	$(BIN)/python -m simulations.bench.dp --json runs/bench/dp.json

bench-rounds: $(VENV)/installed-dev ## What a round costs beside training, and who spends it
	$(BIN)/python -m tests.bench.rounds

bench-aggregation: export OMP_NUM_THREADS ?= 2
bench-aggregation: $(VENV)/installed-dev ## A 7B model's merge: time, memory, and one layer beside PEFT's svd
	$(BIN)/python -m simulations.bench.aggregation

bench-dropout: $(VENV)/installed-dev ## 20 sites, 30 % of which fail in each round: the loss with and without
	$(BIN)/python -m tests.chaos.dropout

chaos-long: $(VENV)/installed-dev ## kill -9 at every point and of every process, again and again: about an hour
	$(BIN)/python -m tests.chaos.long
	CONSILIUM_LONG=1 $(BIN)/pytest tests/chaos/test_half_open.py tests/chaos/test_full_disk_deployed.py

report-picture: $(VENV)/installed-dev ## The README's picture: the report of the demo's run with DP (wants chromium)
	$(BIN)/consilium demo --force
	$(BIN)/python -m tests.report_picture runs/demo/runs/seed-0/federated-with-DP deploy/pictures/report.png

clean: ## Remove what the other targets made
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
