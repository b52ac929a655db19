# Two images from one file: the gateway, and the engine on a CPU with the tiny checkpoint. What they run to install is the project's own
# scripts/install.sh, which a test runs in a clean folder; the images themselves were never built here (no Docker daemon). With gcc, and Python.h
# in the base image, the gateway is compiled.
FROM python:3.11-slim-bookworm AS base
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev curl && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/penstock penstock
ENV PATH=/opt/penstock/venv/bin:$PATH PENSTOCK_HOME=/opt/penstock PYTHONUNBUFFERED=1

FROM base AS gateway
RUN /src/scripts/install.sh /opt/penstock && mkdir -p /opt/penstock/state && chown penstock /opt/penstock/state
USER penstock
EXPOSE 8000 9464
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s CMD ["curl", "-fs", "http://127.0.0.1:8000/livez"]
ENTRYPOINT ["penstock"]
CMD ["serve", "-c", "/etc/penstock/penstock.yaml"]

FROM base AS engine
RUN /src/scripts/install.sh /opt/penstock engine && mkdir -p /opt/penstock/state && chown -R penstock /opt/penstock/state
USER penstock
EXPOSE 30000 30001
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s CMD ["curl", "-fs", "http://127.0.0.1:30001/ready"]
ENTRYPOINT ["penstock"]
CMD ["engine", "-c", "/etc/penstock/penstock.yaml"]
