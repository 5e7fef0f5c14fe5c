# docker build -t latentd .                          CPU
# docker build -t latentd --build-arg DEVICE=cuda .  NVIDIA GPU: docker run --gpus all ...
# docker run -p 8000:8000 -v latentd:/data latentd
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
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

FROM python:${PYTHON}-slim
COPY --from=build /opt/latentd /opt/latentd
RUN useradd --system --uid 10001 --no-create-home latentd && install -d -o latentd /data
USER 10001
ENV PATH=/opt/latentd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LATENTD_HOST=0.0.0.0 \
    LATENTD_PORT=8000 \
    LATENTD_DATA_DIR=/data \
    NUMBA_CACHE_DIR=/data/compiled \
    XDG_CACHE_HOME=/data/cache
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"LATENTD_PORT\"]}/health/ready', timeout=4)"]
CMD ["latentd", "serve"]
