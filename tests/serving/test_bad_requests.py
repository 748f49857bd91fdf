"""Ten thousand requests that are wrong: each is refused with a reason, and the service goes on."""

from __future__ import annotations

from collections import Counter

from bad_requests import GOOD, bad_requests, send_refused

from churn_assets.lifecycle.serving import ask

COUNT = 10_000


def test_ten_thousand_bad_requests_are_refused_each_with_its_field(url: str) -> None:
    sent = send_refused(url, bad_requests(COUNT, seed=5))
    assert len(sent) == COUNT
    assert min(Counter(bad.kind for bad in sent).values()) > 100
    assert ask(url, GOOD).status == 200
