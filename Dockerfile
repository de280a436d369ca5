# syntax=docker/dockerfile:1
# docker build -t deltaserve .                            with CUDA (torch's wheels bring it)
# docker build -t deltaserve:cpu --build-arg DEVICE=cpu . for the CPU, a tenth of the size
# docker run -p 50051:50051 -p 8000:8000 -p 9090:9090 -v /models:/models:ro -v state:/var/lib/deltaserve \
#     deltaserve serve --base /models/base --adapter-root /models/adapters --metrics-port 9090 \
#     --state /var/lib/deltaserve/state.db
# Whoever reaches the ports may do everything until there is a key: docs/identity.md.
# With another --port, set DELTASERVE_ADDRESS=127.0.0.1:PORT for the health check.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG DEVICE=cuda
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
RUN python -m venv /opt/deltaserve
WORKDIR /src
# Dependencies come first, so that a change of the code does not install torch again.
COPY constraints.txt constraints-cpu.txt constraints-cuda.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    case "${DEVICE}" in \
        cpu) set -- --extra-index-url "${TORCH_CPU_INDEX}" ;; \
        cuda) set -- ;; \
        *) echo "DEVICE=${DEVICE}: must be cpu or cuda" >&2; exit 1 ;; \
    esac \
    && /opt/deltaserve/bin/pip install -c "constraints-${DEVICE}.txt" "$@" \
        torch transformers grpcio
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY kernels kernels
COPY adapters adapters
COPY clients clients
COPY server server
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/deltaserve/bin/pip install -c "constraints-${DEVICE}.txt" .

FROM python:${PYTHON}-slim
# The CPU kernels and Triton's launcher are compiled at run time, for the processor they run on.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --create-home deltaserve \
    && install -d -o deltaserve -g deltaserve /var/cache/deltaserve /var/lib/deltaserve
COPY --from=build /opt/deltaserve /opt/deltaserve
ENV PATH=/opt/deltaserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DELTASERVE_CACHE=/var/cache/deltaserve \
    TRITON_CACHE_DIR=/var/cache/deltaserve/triton \
    HF_HUB_OFFLINE=1 \
    DELTASERVE_HOST=0.0.0.0
USER deltaserve
VOLUME /var/cache/deltaserve /var/lib/deltaserve
EXPOSE 50051 8000 9090
STOPSIGNAL SIGTERM
# Loading a large base takes minutes; until then an unhealthy answer does not count.
HEALTHCHECK --interval=10s --timeout=6s --start-period=15m --retries=3 \
    CMD ["deltaserve", "health", "--timeout", "5"]
ENTRYPOINT ["deltaserve"]
CMD ["serve", "--help"]
LABEL org.opencontainers.image.title="deltaserve" \
      org.opencontainers.image.description="Serve every fine-tune of a base model from one copy of that base" \
      org.opencontainers.image.licenses="Apache-2.0"
