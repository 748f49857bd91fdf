# The project's image with Postgres' client programs, which `churn backup` and `churn restore` call:
#   docker compose build backup
# They have to be of the server's version, POSTGRES, or newer; Debian 13 has those of Postgres 17.
ARG PROJECT_IMAGE=churn-assets:0.1.0
ARG BASE_IMAGE=python:3.11.14-slim-trixie

FROM ${PROJECT_IMAGE} AS project

FROM ${BASE_IMAGE}
ARG POSTGRES=17
# On a new server it may be the first to mount the home, whose owner is then that of the folder.
# Debian keeps no older build of a package than its newest, so its version is not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends postgresql-client-${POSTGRES} \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner 1034 --group 1034 /var/lib/churn
ENV PATH=/app/.venv/bin:${PATH} \
    PYTHONPATH=/app \
    LANG=C.UTF-8 \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CHURN_CONFIG=/app/deploy/compose/churn.yaml \
    CHURN_HOME=/var/lib/churn
COPY --from=project /app /app
WORKDIR /app
USER 1034:1034
ENTRYPOINT ["churn"]
CMD ["--help"]
