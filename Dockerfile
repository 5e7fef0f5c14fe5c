# docker build -t latentd .                          CPU
# docker build -t latentd --build-arg DEVICE=cuda .  NVIDIA GPU: docker run --gpus all ...
# docker run -p 8000:8000 -v latentd:/data latentd
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS build
ARG DEVICE=cpu
ENV PATH=/opt/latentd/bin:$PATH
RUN python -m venv /opt/latentd
# PyPI's torch for Linux on x86 brings CUDA; the CPU build is a tenth of its size.
RUN if [ "$DEVICE" = cpu ]; then \
      pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu 'torch>=2.11,<2.14'; \
    elif [ "$DEVICE" = cuda ]; then \
      pip install --no-cache-dir 'torch>=2.11,<2.14'; \
    else \
      echo "DEVICE is '$DEVICE', it must be cpu or cuda" >&2; exit 2; \
    fi
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY server server
RUN pip install --no-cache-dir .

FROM ${BASE}
ARG DEVICE=cpu
# Triton compiles what launches its kernels with a C compiler.
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = cuda ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && \
      rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /opt/latentd /opt/latentd
RUN useradd --system --uid 10001 --no-create-home latentd && install -d -o 10001 -g 10001 /data
USER 10001
ENV PATH=/opt/latentd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LATENTD_HOST=0.0.0.0 \
    LATENTD_PORT=8000 \
    LATENTD_DATA_DIR=/data \
    NUMBA_CACHE_DIR=/data/compiled \
    TRITON_CACHE_DIR=/data/compiled/triton \
    XDG_CACHE_HOME=/data/cache
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"LATENTD_PORT\"]}/health/ready', timeout=4)"]
CMD ["latentd", "serve"]
