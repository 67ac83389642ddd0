# make serve    serve the committed demo bundle at 127.0.0.1:8000
# make test     everything: format, lint, types, tests (a real Redis included)
# make lint     format, lint and types alone
# make train    MovieLens 1M (downloaded) to a new bundle; stop and resume as you like
# make compress the newest version of the demo to one with smaller variants, each measured; stop and resume as you like
# make dashboards-check   every panel and alert against a real Prometheus and faults made on purpose (apt-get installs it, as root)
# make image-check   the Dockerfile's steps in a clean folder and environment
# make lock     renew the locked versions
# make reference-bundle   the shape that speed is measured with, seeded weights, below build/bundles/

PYTHON ?= $(shell command -v python3.11 || command -v python3)
SERVE := .venv-serve
TEST := .venv
export PYTHONPATH := $(CURDIR)/app:$(CURDIR)/models
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: python-version serve test lint format movielens train compress reference-bundle dashboards-check image-check lock clean

serve: $(SERVE)/installed
	$(SERVE)/bin/python -m slatewise.main

test: lint
	$(TEST)/bin/python -m pytest

lint: $(TEST)/installed
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy

format: $(TEST)/installed
	$(TEST)/bin/ruff format .
	$(TEST)/bin/ruff check --fix .

# ML1M and ML_SMALL may name a local zip or folder; without them both are downloaded from GroupLens.
movielens: $(TEST)/installed
	test -f build/data/ml-1m/events.parquet || $(TEST)/bin/python -m slatewise_train.demo.movielens ml-1m $(if $(ML1M),--source $(ML1M))
	test -f build/data/ml-latest-small/events.parquet || $(TEST)/bin/python -m slatewise_train.demo.movielens ml-latest-small $(if $(ML_SMALL),--source $(ML_SMALL))

train: movielens
	$(TEST)/bin/python -m slatewise_train.train models/movielens.toml
	$(TEST)/bin/python -m slatewise_train.meta.limaml models/movielens.toml
	$(TEST)/bin/python -m slatewise_train.export models/movielens.toml

compress: movielens
	$(TEST)/bin/python -m slatewise_train.compress models/bundles/movielens models/movielens.toml --epochs 20 --student blocks=2,feed_forward=2,key_size=32

dashboards-check: $(TEST)/installed
	command -v prometheus promtool || { apt-get update && apt-get install --yes --no-install-recommends prometheus; }
	$(TEST)/bin/python -m loadtest.observability.dashboards

# What the Dockerfile does, without Docker: a clean folder and environment, the image's command, and its health check.
IMAGE := build/image
image-check: | python-version
	rm -rf $(IMAGE)
	$(PYTHON) -m venv $(IMAGE)/venv
	$(IMAGE)/venv/bin/pip install --quiet --no-cache-dir --require-hashes -r deploy/serve.lock
	mkdir -p $(IMAGE)/srv/models
	cp -r app $(IMAGE)/srv/
	cp -r models/bundles $(IMAGE)/srv/models/
	cd $(IMAGE)/srv && env -i PATH="$$PWD/../venv/bin:/usr/bin:/bin" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=app SLATEWISE_PORT=18765 sh -c '\
		python -m slatewise.main & server=$$!; trap "kill $$server" EXIT; \
		for k in $$(seq 60); do \
			python -c "import urllib.request; urllib.request.urlopen(\"http://127.0.0.1:18765/readyz\", timeout=1)" 2>/dev/null && echo healthy && exit 0; sleep 1; \
		done; exit 1'

reference-bundle: $(TEST)/installed
	test -d build/bundles/reference/1 || $(TEST)/bin/python -m slatewise_train.demo.reference

python-version:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" || { echo "Python 3.11 is needed; name it with make PYTHON=..."; exit 1; }

$(SERVE)/installed: deploy/serve.lock | python-version
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet --require-hashes -r deploy/serve.lock
	touch $@

# torch has no hash in a lock: its wheels differ by index (CPU or CUDA build)
$(TEST)/installed: deploy/test.lock | python-version
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/pip install --quiet --require-hashes -r deploy/test.lock
	$(TEST)/bin/pip install --quiet torch==2.13.0
	touch $@

lock: $(TEST)/installed
	$(TEST)/bin/pip install --quiet pip-tools==7.6.2
	$(TEST)/bin/pip-compile --quiet --generate-hashes --strip-extras --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file deploy/serve.lock pyproject.toml
	$(TEST)/bin/pip-compile --quiet --generate-hashes --strip-extras --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --extra train --extra test --unsafe-package torch --output-file deploy/test.lock pyproject.toml

clean:
	rm -rf $(SERVE) $(TEST) build
