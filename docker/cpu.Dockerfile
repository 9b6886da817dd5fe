# Machines without a GPU: ONNX Runtime, and TensorRT-RTX's builder, which needs none.
#
#   docker build -f docker/cpu.Dockerfile --target export  -t resq-deploy:export-cpu  .
#   docker build -f docker/cpu.Dockerfile --target runtime -t resq-deploy:runtime-cpu .
#
# Needs BuildKit. Optional secrets: `ca` (certificates of a network with its own authority), `pip` (a pip.conf).

ARG BASE=debian:bookworm-20250929-slim

FROM ${BASE} AS python
# Debian keeps only the newest version of a package, so pinned ones could not be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*
# Any user may run the image (--user "$(id -u):$(id -g)"), so nothing may depend on a home or a name.
ENV PATH=/opt/resq/bin:$PATH \
    HOME=/tmp \
    USER=resq \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

FROM python AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/resq
WORKDIR /src
COPY docker/pip.sh docker/

# Lists of what to install in a stage of their own: torch is installed again when its line changes, not with the code.
FROM build AS requirements
COPY docker/requirements.py docker/
COPY constraints.txt pyproject.toml ./
RUN docker/requirements.py pyproject.toml export attacks tensorrt-rtx > export.txt \
    && docker/requirements.py pyproject.toml data attacks tensorrt-rtx > runtime.txt

FROM build AS export-dependencies
COPY --from=requirements /src/constraints.txt /src/export.txt ./
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/var/cache/pip \
    docker/pip.sh install -c constraints.txt -r export.txt

FROM build AS runtime-dependencies
COPY --from=requirements /src/constraints.txt /src/runtime.txt ./
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/var/cache/pip \
    docker/pip.sh install -c constraints.txt -r runtime.txt

FROM build AS wheel
COPY LICENSE README.md pyproject.toml ./
COPY export export
COPY runtime runtime
COPY resq_deploy resq_deploy
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/var/cache/pip \
    docker/pip.sh wheel --no-deps --wheel-dir /wheels .

FROM python AS export
COPY --from=export-dependencies /opt/resq /opt/resq
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
USER 1000:1000
WORKDIR /data
CMD ["resq-export", "--help"]

FROM python AS runtime
COPY --from=runtime-dependencies /opt/resq /opt/resq
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
USER 1000:1000
WORKDIR /data
CMD ["resq-validate", "--help"]
