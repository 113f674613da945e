# A hospital: the agent and the node, by one image and two users. From the project's folder:
#   docker build -f deploy/docker/hospital.Dockerfile -t consilium-hospital .
# Without the internet at hand, put the wheel folder of runbook-hospital.md beside pyproject.toml and add
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
# Named volumes take their first owner from these folders. Group 10000 may use the agent's socket.
RUN groupadd --gid 10000 consilium \
    && useradd --uid 10001 --gid 10000 --home-dir /var/lib/consilium-agent --no-create-home consilium-agent \
    && useradd --uid 10002 --gid 10000 --home-dir /var/lib/consilium-node --no-create-home consilium-node \
    && install -d -m 0700 -o 10001 -g 10000 /var/lib/consilium-agent \
    && install -d -m 0700 -o 10002 -g 10000 /var/lib/consilium-node \
    && install -d -m 2750 -o 10001 -g 10000 /run/consilium
ENV PATH=/opt/consilium/bin:$PATH \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    HF_HUB_OFFLINE=1
USER 10001:10000
WORKDIR /var/lib/consilium-agent
# Both are of no use without the agent's socket.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["python", "-c", "import socket; socket.socket(socket.AF_UNIX).connect('/run/consilium/agent.sock')"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["consilium"]
CMD ["client", "agent", "--site", "/var/lib/consilium-agent"]
