# Introvert for CPU. Build from the repository's root:
#   docker build --file docker/cpu.Dockerfile --tag introvert:cpu .
FROM python:3.11-slim-bookworm

# vLLM's CPU build links libnuma and libgomp; make and a compiler serve the install and torch's inductor.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make g++ libnuma1 libgomp1 tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/introvert
COPY deploy/locks deploy/locks
COPY Makefile pyproject.toml README.md LICENSE ./
COPY configs configs
COPY router router
COPY expert_trainer expert_trainer
COPY server server
COPY deploy deploy
RUN make install EXTRA=cpu PYTHON=python3.11
# That leaves bytecode to the first import, which here is by a user who cannot write it; some packages
# hold files that no Python can compile.
RUN .venv/bin/python -m compileall -q -j 0 .venv/lib configs router expert_trainer server deploy || true

COPY docker/entrypoint.sh /usr/local/bin/introvert-node
ENV PATH=/opt/introvert/.venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
RUN useradd --create-home --uid 1000 introvert && mkdir /data && chown introvert /data
USER introvert
WORKDIR /data
VOLUME /data
EXPOSE 8000 6379
ENTRYPOINT ["tini", "--", "introvert-node"]
CMD ["introvert", "--help"]
