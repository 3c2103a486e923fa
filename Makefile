# `make demo` and `make test` are all that a fresh machine needs (Python 3.11+, make, git).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
# Each worker imports torch: more than eight of them cost more memory and start-up than they save time.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
.PHONY: help demo test test-slow test-slow-process test-slow-root check docs fmt bench reproduce reproduce-batches robustness chaos fuzz arm fleet-proof clean

help:
	@echo "make demo   set everything up, build the demo model and bundle, answer three questions over MQTT"
	@echo "           (make demo MODEL=qwen3-moe: with the second demo model)"
	@echo "           (then $(BIN)/wdmoe-testbed up serves it, with a live page, until Ctrl-C; $(BIN)/wdmoe-testbed doctor)"
	@echo "make test   set everything up and run the quick tests (make test-slow: the others)"
	@echo "make check  formatting, lint, types and import rules"
	@echo "make docs   the documentation site, in build/docs/site; broken links and anchors are errors"
	@echo "make bench  benchmarks: a table, and JSON with raw samples under runs/"
	@echo "make reproduce DATA=folder  the tables of policies in docs/results.md, as root, in half an hour"
	@echo "make reproduce-batches DATA=folder  those for batches, in as much time again"
	@echo "make robustness DATA=folder [ITEMS=100] [JOBS=8] [GPU=1]  both demo models on six data sets, as root, in up to six hours"
	@echo "make chaos  200 answers under random faults, as root (docs/reliability.md)"
	@echo "make fuzz   damaged inputs to every reader of outside data, 100,000 each, in about an hour"
	@echo "make arm    nodes from aarch64 wheels on an emulated Pi 5 and Pi 4, against this machine (needs qemu-user-static)"
	@echo "make fleet-proof  deploy to five fresh Debian machines and prove it, as root (docs/deploy.md)"
	@echo "make clean  remove the environment and everything built here (downloads stay in the user cache)"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wdmoe needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing Python packages into $(VENV): some minutes the first time, most of it for torch"
	$(BIN)/pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[testbed,dev,docs]'
	@touch $@

demo: $(READY)
	$(BIN)/wdmoe-testbed demo $(if $(MODEL),--model $(MODEL))

test: $(READY)
	$(BIN)/pytest $(PARALLEL) tests/unit

test-slow: test-slow-process test-slow-root

test-slow-process: $(READY)
	$(BIN)/pytest $(PARALLEL) tests/process

# One after the other: they measure emulated networks, which need the machine for themselves.
test-slow-root: $(READY)
	$(BIN)/pytest tests/root

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python -m testbed.proof.site build/docs

fmt: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/wdmoe-testbed bench

reproduce: PLAN = policies
reproduce-batches: PLAN = batches
reproduce reproduce-batches: $(READY)
	@test -n "$(DATA)" || { echo "say make $@ DATA=folder with arc_easy_test.jsonl and piqa_valid.jsonl (docs/measurement.md)" >&2; exit 2; }
	OMP_WAIT_POLICY=passive $(BIN)/wdmoe-testbed run testbed/experiment/plans/$(PLAN).yaml --data $(DATA) --out runs/$(PLAN)
	$(BIN)/wdmoe-testbed report runs/$(PLAN)

# Continues where it was interrupted. JOBS processes measure accuracy at once, each with the whole model.
JOBS ?= $(shell n=$$(nproc); echo $$((n > 2 ? n / 2 : 1)))
robustness: export OMP_WAIT_POLICY = passive
robustness: $(READY)
	@test -n "$(DATA)" || { echo "say make $@ DATA=folder with the six data sets (docs/measurement.md)" >&2; exit 2; }
	if [ -e runs/robustness/manifest.json ]; then $(BIN)/wdmoe-testbed resume runs/robustness --jobs $(JOBS) $(if $(GPU),--gpu); \
	else $(BIN)/wdmoe-testbed run testbed/experiment/plans/robustness.yaml --data $(DATA) --out runs/robustness \
		--jobs $(JOBS) $(if $(ITEMS),--items $(ITEMS)) $(if $(GPU),--gpu); fi
	$(BIN)/wdmoe-testbed report runs/robustness

chaos: $(READY)
	$(BIN)/wdmoe-testbed chaos

fuzz: $(READY)
	$(BIN)/pytest tests/unit/testbed/test_fuzz.py --hypothesis-profile=fuzz --timeout=0

arm: $(READY)
	$(BIN)/wdmoe-testbed arm

fleet-proof: $(READY)
	$(BIN)/python -m testbed.proof.fleet_proof

clean:
	rm -rf $(VENV) .venvs build dist runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
