# Introvert for NVIDIA GPUs. Build from the repository's root:
#   docker build --file docker/gpu.Dockerfile --tag introvert:gpu .
# The wheels bring CUDA's libraries; the devel image brings the compiler that vLLM's kernels are built with at first use.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends software-properties-common \
    && add-apt-repository --yes ppa:deadsnakes/ppa \
    && apt-get install --yes --no-install-recommends \
       make g++ python3.11 python3.11-dev python3.11-venv libnuma1 tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/introvert
COPY deploy/locks deploy/locks
COPY Makefile pyproject.toml README.md LICENSE ./
COPY configs configs
COPY router router
COPY expert_trainer expert_trainer
COPY server server
COPY deploy deploy
RUN make install EXTRA=gpu PYTHON=python3.11
# That leaves bytecode to the first import, which here is by a user who cannot write it; some packages
# hold files that no Python can compile.
RUN .venv/bin/python -m compileall -q -j 0 .venv/lib configs router expert_trainer server deploy || true

COPY docker/entrypoint.sh /usr/local/bin/introvert-node
ENV PATH=/opt/introvert/.venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
RUN useradd --create-home --uid 1001 introvert && mkdir /data && chown introvert /data
USER introvert
WORKDIR /data
VOLUME /data
EXPOSE 8000 6379
ENTRYPOINT ["tini", "--", "introvert-node"]
CMD ["introvert", "--help"]
