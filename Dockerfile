# The stage `build` installs the packages. `server` has neither pip nor its cache, and no model: `docker build --target server`.
# The last stage adds the demo. Python 3.11, because the whole test suite runs on it; the serving lock also holds for 3.12 to 3.14.
FROM python:3.11-slim-bookworm AS build
COPY deploy/serve.lock /tmp/serve.lock
RUN python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install --no-cache-dir --require-hashes -r /tmp/serve.lock
# Packages beyond the lock: --build-arg PACKAGES=polars for SLATEWISE_EVENTS_DIR.
ARG PACKAGES=""
RUN test -z "$PACKAGES" || pip --python /venv/bin/python install --no-cache-dir $PACKAGES
COPY deploy/health_check.py /srv/
COPY app /srv/app
COPY models/bundles /demo
RUN chmod -R a+rX /srv /demo  # a checkout made under umask 077 is private to its owner

FROM python:3.11-slim-bookworm AS server
COPY --from=build /venv /venv
COPY --from=build /srv /srv
WORKDIR /srv
USER 10001
ENV PATH=/venv/bin:$PATH PYTHONPATH=/srv/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 SLATEWISE_HOST=0.0.0.0
EXPOSE 8000
# Asks GET /readyz.
HEALTHCHECK --interval=5s --timeout=2s --start-period=60s CMD ["python", "-I", "-S", "health_check.py"]
CMD ["python", "-m", "slatewise", "serve"]

FROM server
COPY --from=build /demo /srv/models/bundles
