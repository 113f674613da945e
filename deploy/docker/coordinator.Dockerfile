# The coordinator. From the project's folder:
#   docker build -f deploy/docker/coordinator.Dockerfile -t consilium-coordinator .
# Without the internet at hand, put the wheel folder of runbook-coordinator.md beside pyproject.toml and add
#   --build-arg PIP_ARGS="--no-index --find-links wheels"

FROM python:3.11-slim-bookworm AS build
ARG PIP_ARGS=""
WORKDIR /src
COPY . .
# hadolint ignore=SC2086
RUN python -m venv /opt/consilium \
    && /opt/consilium/bin/pip install --no-cache-dir --disable-pip-version-check ${PIP_ARGS} -c constraints.txt .

FROM python:3.11-slim-bookworm
COPY --from=build /opt/consilium /opt/consilium
# Named volumes take their first owner from these folders; the second is the edge's.
RUN groupadd --gid 10001 consilium \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/consilium-coordinator --no-create-home consilium \
    && install -d -m 0700 -o 10001 -g 10001 /var/lib/consilium-coordinator \
    && install -d -m 0700 -o 10002 -g 10002 /var/lib/consilium-edge
ENV PATH=/opt/consilium/bin:$PATH \
    HOME=/var/lib/consilium-coordinator \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /var/lib/consilium-coordinator
VOLUME /var/lib/consilium-coordinator
# On loopback: the edge shares this container's network. The certificate is good for localhost.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["python", "-c", "import ssl, urllib.request as u; u.urlopen('https://localhost:8000/health', timeout=8, context=ssl.create_default_context(cafile='tls/ca.crt'))"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["consilium"]
CMD ["server", "up", "/var/lib/consilium-coordinator"]
