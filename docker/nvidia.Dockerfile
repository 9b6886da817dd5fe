# Machines with an NVIDIA GPU, x86-64 or Jetson: TensorRT as NVIDIA's image brings it.
#
#   docker build -f docker/nvidia.Dockerfile --target export  -t resq-deploy:export  .
#   docker build -f docker/nvidia.Dockerfile --target runtime -t resq-deploy:runtime .
#
# Jetson, on the device or with --platform linux/arm64 (runtime only):
#   JetPack 6   --build-arg BASE=nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel --build-arg CONSTRAINTS=/dev/null
#               (its Python is 3.10, for which the pinned versions do not all exist)
#   JetPack 7   --build-arg BASE=nvcr.io/nvidia/tensorrt:25.11-py3
#
# Needs BuildKit. Optional secrets: `ca` (certificates of a network with its own authority), `pip` (a pip.conf).

ARG BASE=nvcr.io/nvidia/tensorrt:25.06-py3

FROM ${BASE} AS python
# The distribution keeps only the newest version of a package, so pinned ones could not be installed for long.
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
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/resq
WORKDIR /src
COPY docker/pip.sh docker/

# Lists of what to install in a stage of their own: torch is installed again when its line changes, not with the code.
# TensorRT itself is the image's: an engine is tied to its version.
FROM build AS requirements
ARG CONSTRAINTS=constraints.txt
COPY docker/requirements.py docker/
COPY constraints.txt pyproject.toml ./
RUN docker/requirements.py pyproject.toml data attacks cuda > runtime.txt \
    && docker/requirements.py pyproject.toml export tensorrt-rtx > export.txt \
    && cat "$CONSTRAINTS" > pinned.txt

# pycuda is compiled against the image's CUDA.
FROM build AS runtime-dependencies
COPY --from=requirements /src/pinned.txt /src/runtime.txt ./
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/var/cache/pip \
    PATH="/usr/local/cuda/bin:$PATH" docker/pip.sh install -c pinned.txt -r runtime.txt

FROM runtime-dependencies AS export-dependencies
COPY --from=requirements /src/export.txt ./
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/var/cache/pip \
    docker/pip.sh install -c pinned.txt -r export.txt

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
