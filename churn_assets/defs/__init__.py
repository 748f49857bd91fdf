"""The only room that imports dagster."""

import warnings

# Single-run backfills and mappings over days that never existed are beta in dagster 1.13; both are
# wanted, and a dozen lines about them hide what a person should read.
warnings.filterwarnings("ignore", message=".* is currently in beta, and may have breaking changes")
