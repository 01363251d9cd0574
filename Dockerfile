# The server's image. Build it for a CPU, or with --build-arg EXTRA=gpu for an NVIDIA GPU: CUDA's and
# cuDNN's libraries then come with the Python packages, so the base stays the same. Any other base
# needs Python 3.11 or newer with venv.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG EXTRA=cpu
WORKDIR /src
# What we depend on, in a layer of its own: it changes rarely and weighs most.
COPY pyproject.toml constraints.txt ./
COPY protos/pyproject.toml protos/
RUN python3 -m venv /opt/concertina \
    && /opt/concertina/bin/python -c "import tomllib; \
server, client = (tomllib.load(open(file, 'rb'))['project'] for file in ('pyproject.toml', 'protos/pyproject.toml')); \
extras = server['optional-dependencies'] | client['optional-dependencies']; \
lines = sum((extras[name] for name in ('${EXTRA}', 's3', 'codecs', 'cli')), server['dependencies'] + client['dependencies']); \
print(*(line for line in lines if not line.startswith('concertina-client')), sep='\n')" > requirements.txt \
    && /opt/concertina/bin/pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN /opt/concertina/bin/pip install --no-cache-dir --constraint constraints.txt --no-deps ./protos . \
    && /opt/concertina/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') and 'torch is in the serving image: find who requires it')"

FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 concertina \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin concertina
COPY --from=build /opt/concertina /opt/concertina
COPY bundles /bundles
# Everything that is written, Ray's session included, goes to /tmp: the root may be read-only.
ENV PATH=/opt/concertina/bin:$PATH \
    HOME=/tmp \
    RAY_TMPDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# `serve` takes every bundle in ./bundles unless some are named.
WORKDIR /
USER 10001:10001
EXPOSE 9000 8000 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.build_opener(urllib.request.ProxyHandler({})).open('http://127.0.0.1:9100/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["concertina"]
CMD ["serve", "--host", "0.0.0.0"]
