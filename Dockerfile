# Two stages: packages are installed in the first, the second has neither pip's cache nor torch.
FROM python:3.11-slim-bookworm AS packages
COPY deploy/serve.lock /tmp/serve.lock
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --require-hashes -r /tmp/serve.lock

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home slatewise
COPY --from=packages /venv /venv
WORKDIR /srv
COPY app ./app
COPY models/bundles ./models/bundles
USER slatewise
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/srv/app SLATEWISE_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=2s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=1)"]
CMD ["python", "-m", "slatewise.main"]
