"""The endpoint of the churn service on bare uvicorn: what BentoML costs on top is the rest."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from churn_assets.contract.release import read_release
from churn_assets.contract.response import LaneHealth
from churn_service.endpoint import Endpoint
from churn_service.served import Served
from churn_service.traffic import Limits

app = Endpoint(LaneHealth(fast=True, reason=None), Limits())
app.start(Served(read_release(Path(os.environ["CHURN_RELEASE_DIR"]))))
gc.freeze()
gc.set_threshold(700, 10, 1000)
