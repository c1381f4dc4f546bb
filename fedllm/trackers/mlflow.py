"""MLflow: the server that MLFLOW_TRACKING_URI names, or without it a file store in the run's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedllm.trackers.tracker import Tracker

EXPERIMENT = "fedllm"


class MLflow(Tracker):
    """One run of the experiment `fedllm` (or of that which MLFLOW_EXPERIMENT_NAME names)."""

    package: ClassVar[str] = "mlflow"

    def open(self, folder: Path, name: str, config: Mapping[str, Any], id: str | None) -> str:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no server, and no database
            uri = folder.resolve().as_uri()
        self.client = MlflowClient(tracking_uri=uri)
        if id is not None:
            self.id = id
            self.client.update_run(id, status="RUNNING")
            return id
        where = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self.client.get_experiment_by_name(where)
        experiment = found.experiment_id if found else self.client.create_experiment(where)
        self.id = str(self.client.create_run(experiment, run_name=name).info.run_id)
        for key, value in config.items():
            self.client.log_param(self.id, key, value)
        return self.id

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self.client.log_metric(self.id, key, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.id)
