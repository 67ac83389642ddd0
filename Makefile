# make serve    serve the committed demo bundle at 127.0.0.1:8000
# make test     format, lint, types, then all tests (a real Redis included)
# make coverage all tests with the branch coverage of both packages, which has a floor; takes half as long again
# make lint     format, lint and types alone
# make train    MovieLens 1M (downloaded) to a new bundle; stop and resume at any time
# make compress the newest version of the demo to one with smaller variants, each measured; stop and resume at any time
# make chaos    tests to the point of failure, an hour; writes docs/chaos.md; ONLY=soak runs one of them; stop and resume
# make dashboards-check   every panel and alert against a real Prometheus and injected faults (apt-get installs it, as root)
# make compose-check      docker-compose.yml in real containers: build, start, ask, scale, kill, roll, take down
# make install-check      install, serve and ask one request: with every supported Python here, and from the built wheel
# make image-check        the Dockerfile's steps in a clean folder and environment
# make wheels-check       every locked package has a wheel for each supported platform and Python
# make lock     write deploy/*.lock; UPGRADE=1 takes the newest releases
# make audit    known vulnerabilities of the locked packages; exit code 2: the advisories were not reached
# make sbom     the bill of materials of the serving install, build/sbom.json, CycloneDX
# make reference-bundle   the bundle that speed is measured with, seeded weights, below build/bundles/
#
# Needs Python 3.11 to 3.14: the newest on the PATH, or the one in PYTHON (make serve PYTHON=/usr/bin/python3.12).

PYTHON ?=
SERVE := .venv-serve
TEST := .venv
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadfile
export PYTHONPATH := $(CURDIR)/app:$(CURDIR)/models
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Libraries that send usage data by default.
export ORT_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: serve test coverage lint format movielens train compress chaos dashboards-check compose-check install-check image-check wheels-check \
	lock audit sbom reference-bundle serve-environment test-environment clean

# Ctrl-C reaches the server, the shell and make: with the trap, the shell waits for the server's quiet end.
serve: serve-environment
	@echo "Serving the demo; stop with Ctrl-C"
	@trap : INT; $(SERVE)/bin/python -m slatewise serve || [ $$? = 130 ]

test: lint
	$(TEST)/bin/python -m pytest $(PARALLEL)

coverage: test-environment
	$(TEST)/bin/python -m pytest --cov $(PARALLEL)

lint: test-environment
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy
	$(TEST)/bin/mypy models/slatewise_train

format: test-environment
	$(TEST)/bin/ruff format .
	$(TEST)/bin/ruff check --fix .

# ML1M and ML_SMALL may name a local zip or folder; without them both are downloaded from GroupLens.
movielens: test-environment
	test -f build/data/ml-1m/events.parquet || $(TEST)/bin/python -m slatewise_train.demo.movielens ml-1m $(if $(ML1M),--source $(ML1M))
	test -f build/data/ml-latest-small/events.parquet || $(TEST)/bin/python -m slatewise_train.demo.movielens ml-latest-small $(if $(ML_SMALL),--source $(ML_SMALL))

train: movielens
	$(TEST)/bin/python -m slatewise train models/movielens.toml
	$(TEST)/bin/python -m slatewise limaml models/movielens.toml
	$(TEST)/bin/python -m slatewise export models/movielens.toml --all-users

LOWRANK := lowrank,lowrank-int8,lowrank-60,lowrank-60-int8,lowrank-45,lowrank-45-int8

compress: movielens
	$(TEST)/bin/python -m slatewise compress models/bundles/movielens models/movielens.toml --variants int8,int8-tables8,$(LOWRANK) \
		--layers up,down,attention_gate,feed_forward_gate --share 0.8,0.6,0.45 --least-rank 16 --epochs 16 --force $(LOWRANK) --all-users

reference-bundle: test-environment
	test -d build/bundles/reference/1 || $(TEST)/bin/python -m slatewise_train.demo.reference

chaos: test-environment
	$(TEST)/bin/python -m loadtest.chaos $(if $(ONLY),--only $(ONLY))

dashboards-check: test-environment
	command -v prometheus promtool || { apt-get update && apt-get install --yes --no-install-recommends prometheus; }
	$(TEST)/bin/python -m loadtest.observability.dashboards

# CHECK="--no-refresh" leaves out the image with torch.
compose-check:
	@$$(.ci/find-python $(PYTHON)) -m loadtest.compose $(CHECK)

install-check:
	@.ci/install-check

wheels-check: test-environment
	$(TEST)/bin/python .ci/wheels.py

# The Dockerfile's steps without Docker: a clean folder and environment, the image's command, and its health check.
IMAGE := build/image
image-check:
	rm -rf $(IMAGE)
	.ci/environment $(IMAGE)/venv serve "$(PYTHON)"
	$(IMAGE)/venv/bin/python -m pip uninstall --quiet --yes setuptools pip
	mkdir -p $(IMAGE)/srv/models
	cp -r app deploy/health_check.py $(IMAGE)/srv/
	cp -r models/bundles $(IMAGE)/srv/models/
	port=$$($(IMAGE)/venv/bin/python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])') && \
		cd $(IMAGE)/srv && env -i PATH="$$PWD/../venv/bin:/usr/bin:/bin" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=app \
		ORT_DISABLE_TELEMETRY=1 SLATEWISE_PORT=$$port sh -c '\
		python -m slatewise serve & server=$$!; trap "kill $$server" EXIT; \
		for k in $$(seq 60); do \
			python -I -S health_check.py 2>/dev/null && echo healthy && exit 0; sleep 1; \
		done; exit 1'

lock:
	@$$(.ci/find-python $(PYTHON)) -m venv --clear build/lock
	build/lock/bin/pip install --quiet uv==0.13.9
	.ci/lock build/lock/bin/uv

audit:
	@.ci/audit vulnerabilities "$(PYTHON)"

sbom:
	@.ci/audit sbom "$(PYTHON)"

serve-environment:
	@.ci/environment $(SERVE) serve "$(PYTHON)"

test-environment:
	@.ci/environment $(TEST) test "$(PYTHON)"

clean:
	rm -rf $(SERVE) $(TEST) build
