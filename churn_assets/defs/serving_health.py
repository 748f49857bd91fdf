"""Monitoring: is the service fast, does it answer, and is it asked as much as usual?"""

import dagster as dg

from churn_assets.defs.metadata import figures_table, metric_check, metrics_table
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.lifecycle.pointer import read_current
from churn_assets.monitoring.service_samples import read_samples, take_sample
from churn_assets.monitoring.serving_health import (
    Service,
    ServingHealthRecord,
    answered_rows,
    volume_of,
)
from churn_assets.monitoring.serving_health import serving_health as judge_service

POLICY = SETTINGS.serving_health
CHECKS = {
    "latency": (
        "p95_latency_ms",
        f"The 95th percentile is at most {POLICY.max_p95_latency_ms:g} ms",
    ),
    "errors": ("error_rate", f"At most {POLICY.max_error_rate:.1%} of the requests fail"),
    "volume": ("volume_ratio", f"At least {POLICY.min_volume_ratio:.0%} of what is usual is asked"),
    "up": ("service_up", "The service of this home answers while a version is in Production"),
}


@dg.asset(
    group_name="monitoring",
    kinds={"prometheus"},
    owners=[f"team:{SETTINGS.team}"],
    deps=["prediction_log", "deployment"],
    check_specs=[
        dg.AssetCheckSpec(
            name, asset="serving_health", description=f"{description}; too little does not pass."
        )
        for name, (_, description) in CHECKS.items()
    ],
)
def serving_health(context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]):
    """Latency, errors and volume of the last window, by the service's counters and its log."""
    record = look(project)
    project.add_metrics(record.metrics)
    context.log.info("%s: %s", record.verdict, record.reason)
    return dg.MaterializeResult(
        value=record,
        metadata={
            "verdict": record.verdict,
            "reason": record.reason,
            "service": record.url or "none is running",
            "release": record.release_id or "-",
            "window": f"{record.since:%Y-%m-%d %H:%M} to {record.until:%Y-%m-%d %H:%M}",
            "metrics": metrics_table(record.metrics),
            "releases": figures_table(
                [
                    {
                        "release": line.release_id,
                        "predictions": line.predictions,
                        "p95_latency_ms": line.p95_latency_ms,
                    }
                    for line in record.releases
                ]
            ),
        },
        check_results=[metric_check(c, record.metric(m)) for c, (m, _) in CHECKS.items()],
    )


def look(project: Project) -> ServingHealthRecord:
    """Ask the service, keep what it counted, and judge the window that ends now."""
    home, now = project.home, project.now()
    since = now - POLICY.window
    url, sample = take_sample(home, now, POLICY.url)
    return judge_service(
        Service(url, sample, expected=read_current(home.current) is not None),
        read_samples(home.service_samples, since),
        answered_rows(project.lake, since, now),
        volume_of(project.lake, POLICY, now),
        POLICY,
        now=now,
    )
