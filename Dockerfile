# Images of a node and of the base station: docs/containers.md. `docker build --target node .`
FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/wdmoe/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# Empty volumes that are mounted at these folders belong to their owner.
RUN useradd --uid 1000 --home-dir /var/lib/wdmoe --create-home wdmoe \
    && install -d -o wdmoe -g wdmoe /bundle /models
WORKDIR /var/lib/wdmoe

FROM base AS source
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY wire wire
COPY exporter exporter
COPY edge_node edge_node
COPY bs_coordinator bs_coordinator
COPY testbed testbed
COPY wdmoe wdmoe
RUN python -m venv /opt/wdmoe

FROM source AS node-packages
RUN pip install --no-cache-dir -c constraints.txt '.[edge]'

FROM source AS base-station-packages
# PyPI's torch comes with CUDA: another index can give one for CPUs (docs/containers.md).
ARG PIP_EXTRA_INDEX_URL
# The demo model and bundles are made in this image as well.
RUN pip install --no-cache-dir -c constraints.txt '.[bs,exporter,tracing]'

FROM base AS node
# mosquitto_sub reads the node's status in health checks. Debian keeps only the newest version of a stable package.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends mosquitto-clients && rm -rf /var/lib/apt/lists/*
COPY --from=node-packages /opt/wdmoe /opt/wdmoe
USER 1000:1000
ENTRYPOINT ["wdmoe-node"]

FROM base AS base-station
COPY --from=base-station-packages /opt/wdmoe /opt/wdmoe
USER 1000:1000
EXPOSE 8080
# Status 503, while experts can't be reached, is an error of urlopen.
HEALTHCHECK --interval=10s --timeout=6s --start-period=5m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=5)"]
ENTRYPOINT ["wdmoe-bs"]
