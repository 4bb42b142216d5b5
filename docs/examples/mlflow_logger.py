"""Log training to MLflow, as to any tracker that fastsae does not know.

A logger has three methods. This one logs settings, metrics, the final numbers and the SAE to
MLflow's local store, RUN/mlflow.db.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import torch

from fastsae import TrainConfig, Trainer
from fastsae.nn import TopKConfig
from fastsae.train import RunInfo


class MLflow:
    def start(self, run: RunInfo) -> None:
        self.out = run.out
        mlflow.set_tracking_uri(f"sqlite:///{run.out.resolve()}/mlflow.db")
        mlflow.set_experiment("fastsae")
        mlflow.start_run(run_name=run.out.name)
        mlflow.log_params(run.flat)

    def log(self, step: int, numbers: Mapping[str, int | float]) -> None:
        mlflow.log_metrics(dict(numbers), step)

    def end(self, results: Mapping[str, Any] | None) -> None:
        if results is not None:
            mlflow.log_metrics({f"final/{name}": results[name] for name in ("fvu", "l0")})
            mlflow.log_artifacts(str(self.out / "sae"), "sae")
        mlflow.end_run("KILLED" if results is None else "FINISHED")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--out", type=Path, default=Path("runs/mlflow"))
options = parser.parse_args()

x = torch.randn(16384, 16) @ torch.randn(16, 64)  # your activations
config = TrainConfig(
    d_sae=256, activation=TopKConfig(k=8), steps=options.steps, batch_size=512, out=options.out
)
Trainer(config, x, loggers=[MLflow()]).fit()
(run,) = mlflow.search_runs(experiment_names=["fastsae"], output_format="list")
print(f"final FVU {run.data.metrics['final/fvu']:.4f} in MLflow's run {run.info.run_name}")
