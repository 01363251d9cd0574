# The images for Concertina: the server's, which is the last one here, and with --target convert the one
# that makes bundles of pretrained models, which the server's cannot, as it has no torch. Build the
# server's for a CPU, or with --build-arg EXTRA=gpu for an NVIDIA GPU: CUDA's and cuDNN's libraries then
# come with the Python packages, so the base stays the same. Any other base needs Python 3.11 or newer
# with venv.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS requirements
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

FROM requirements AS build
COPY . .
RUN /opt/concertina/bin/pip install --no-cache-dir --constraint constraints.txt --no-deps ./protos . \
    && /opt/concertina/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') and 'torch is in the serving image: find who requires it')"

FROM requirements AS build-convert
# PyTorch's index of packages for a CPU: those of PyPI bring CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/concertina/bin/python -c "import tomllib; \
extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
print(*extras['train'], *extras['hub'], sep='\n')" > requirements.txt \
    && /opt/concertina/bin/pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN /opt/concertina/bin/pip install --no-cache-dir --constraint constraints.txt --no-deps ./protos .

FROM ${BASE_IMAGE} AS base
RUN groupadd --gid 10001 concertina \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin concertina
# Everything that is written, Ray's session included, goes to /tmp: the root may be read-only.
ENV PATH=/opt/concertina/bin:$PATH \
    HOME=/tmp \
    RAY_TMPDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /
ENTRYPOINT ["concertina"]

FROM base AS convert
COPY --from=build-convert /opt/concertina /opt/concertina
USER 10001:10001
CMD ["prepare", "--help"]

FROM base
COPY --from=build /opt/concertina /opt/concertina
# `serve` takes every bundle in ./bundles unless some are named.
COPY bundles /bundles
USER 10001:10001
EXPOSE 9000 8000 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.build_opener(urllib.request.ProxyHandler({})).open('http://127.0.0.1:9100/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["serve", "--host", "0.0.0.0"]
