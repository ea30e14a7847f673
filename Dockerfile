# syntax=docker/dockerfile:1
# bnexport in a container, with the steps of scripts/demo: a virtual environment, then "pip install .".
#
#   docker build --target gpu -t bnexport:gpu .     (the default target)
#   docker build --target cpu -t bnexport:cpu --build-arg CPU_INDEX_URL=<index with CPU builds of torch> .
#   docker run --rm --gpus all -v "$PWD/runs:/home/bnexport/runs" bnexport:gpu train --out runs/bn_lenet
#   docker run --rm -v "$PWD/models:/home/bnexport/models:ro" bnexport:cpu verify models/bn_lenet/1
#
# Both targets start from the plain Python image and not from a CUDA image: the wheels of torch and of
# onnxruntime-gpu[cuda,cudnn] bring their own CUDA and cuDNN libraries, in the versions they were built for. A CUDA image
# would add a second copy of several gigabytes that the loader may pick up by mistake. The driver comes from the host
# through the NVIDIA container toolkit.

ARG PYTHON_VERSION=3.11.13

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VIRTUAL_ENV=/opt/bnexport \
    PATH=/opt/bnexport/bin:$PATH
RUN useradd --create-home --uid 10001 bnexport
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY bnexport ./bnexport
COPY scripts ./scripts

FROM base AS cpu
# Without an index of CPU builds pip takes the usual wheels: the same program, with CUDA libraries that lie unused.
ARG CPU_INDEX_URL=
RUN PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=${CPU_INDEX_URL} BNEXPORT_VENV=/opt/bnexport scripts/make_venv .
USER 10001
WORKDIR /home/bnexport
ENTRYPOINT ["bnexport"]
CMD ["--help"]

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN PIP_NO_CACHE_DIR=1 BNEXPORT_VENV=/opt/bnexport scripts/make_venv .
USER 10001
WORKDIR /home/bnexport
ENTRYPOINT ["bnexport"]
CMD ["--help"]
