"""The project's own user of an MLflow server: `mlflow_user.py URL USER EXPERIMENT MODEL`.

It is no administrator: it may read what is there, make experiments and registered models, and
change those it made, and the two named here if an administrator made them before. The login of the
administrator is MLflow's variables, MLFLOW_USER_PASSWORD the user's password.
"""

from __future__ import annotations

import os
import sys

from mlflow import MlflowClient
from mlflow.exceptions import RestException
from mlflow.server.auth.client import AuthServiceClient

ALL = "MANAGE"


def make_user(url: str, user: str, password: str, experiment: str, model: str) -> str:
    """Make `user` or give it this password, and its rights; a line that says what was done.

    Raises RestException where the server refuses.
    """
    users, client = AuthServiceClient(url), MlflowClient(url)
    try:
        users.get_user(user)
    except RestException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        users.create_user(user, password)
        told = f"made the user {user}"
    else:
        users.update_user_password(user, password)
        told = f"the user {user} has its password"
    found = client.get_experiment_by_name(experiment)
    there = [("experiment", found.experiment_id, f"experiment {experiment}")] if found else []
    if client.search_registered_models(f"name = '{model}'"):
        there.append(("registered_model", model, f"registered model {model}"))
    for kind, id, title in there:
        if users.get_user_permission(user, kind, id).permission != ALL:
            users.grant_user_permission(user, kind, id, ALL)
            told += f", and may change the {title}"
    return told


if __name__ == "__main__":
    url, user, experiment, model = sys.argv[1:]
    print(make_user(url, user, os.environ["MLFLOW_USER_PASSWORD"], experiment, model))
