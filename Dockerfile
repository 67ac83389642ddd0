# Stages: `server` is the service without a model, `refresh` the job that writes users' vectors, the last one `server` with the demo.
#   docker build --target server .       docker build --target refresh .       docker build .
# Python 3.11, because the whole test suite runs on it; the locks also hold for 3.12 to 3.14.
#
# Behind a proxy or with a package index of your own: --build-arg PIP_INDEX_URL=..., and the proxy's CA as
# deploy/certificates/NAME.crt. Nothing of them is left in the images.
FROM python:3.11-slim-bookworm AS packages
ARG PIP_INDEX_URL=""
ARG PIP_TRUSTED_HOST=""
ENV PIP_CERT=/tmp/certificates.pem PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY deploy/certificates /tmp/certificates
RUN cat /etc/ssl/certs/ca-certificates.crt $(find /tmp/certificates -name "*.crt") > $PIP_CERT \
    && python -m venv --without-pip /venv

# The allocator of the server: less CPU time and memory than with glibc's (docs/performance.md).
FROM packages AS allocator
RUN apt-get update && apt-get install --yes --no-install-recommends libjemalloc2 \
    && cp --dereference /usr/lib/*/libjemalloc.so.2 /tmp/

FROM packages AS build
COPY deploy/serve.lock /tmp/serve.lock
RUN pip --python /venv/bin/python install --require-hashes -r /tmp/serve.lock
# Packages beyond the lock: --build-arg PACKAGES=polars for SLATEWISE_EVENTS_DIR.
ARG PACKAGES=""
RUN test -z "$PACKAGES" || pip --python /venv/bin/python install $PACKAGES
COPY deploy/health_check.py /srv/
COPY app /srv/app
COPY models/bundles /demo
RUN chmod -R a+rX /srv /demo  # a checkout made under umask 077 is private to its owner

FROM packages AS build-refresh
# torch has no hashes, because its wheels differ by index. The default index has it without 4 GB of CUDA libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY deploy/refresh.lock /tmp/refresh.lock
RUN pip --python /venv/bin/python install --require-hashes -r /tmp/refresh.lock \
    && pip --python /venv/bin/python install --no-deps --index-url "$TORCH_INDEX" torch==2.13.0
COPY app /srv/app
COPY models/slatewise_train /srv/models/slatewise_train
RUN chmod -R a+rX /srv

FROM python:3.11-slim-bookworm AS refresh
COPY --from=build-refresh /venv /venv
COPY --from=build-refresh /srv /srv
WORKDIR /srv
USER 10001
ENV PATH=/venv/bin:$PATH PYTHONPATH=/srv/app:/srv/models PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 HOME=/tmp
CMD ["python", "-m", "slatewise", "refresh", "--help"]

FROM python:3.11-slim-bookworm AS server
COPY --from=allocator /tmp/libjemalloc.so.2 /usr/local/lib/
COPY --from=build /venv /venv
COPY --from=build /srv /srv
RUN mkdir -p /srv/models/bundles /events && chown 10001 /events  # a new named volume takes this owner
WORKDIR /srv
USER 10001
ENV PATH=/venv/bin:$PATH PYTHONPATH=/srv/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 LD_PRELOAD=/usr/local/lib/libjemalloc.so.2 MALLOC_CONF=oversize_threshold:0 \
    SLATEWISE_HOST=0.0.0.0
EXPOSE 8000
# Asks GET /readyz.
HEALTHCHECK --interval=5s --timeout=2s --start-period=60s CMD ["python", "-I", "-S", "health_check.py"]
CMD ["python", "-m", "slatewise", "serve"]

FROM server
COPY --from=build /demo /srv/models/bundles
