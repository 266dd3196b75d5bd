"""Experiment trackers: the figures of a run in MLflow or Weights & Biases, through their own libraries.

Both get the resolved configuration once and every finite figure over the number of optimizer steps. A resumed run
continues the tracker's run, whose id is stored in the workspace. A failure at the start stops the job. If a tracker
cannot be reached later, a warning is logged once, and the tracker is left alone for some minutes at a time, since its
libraries wait long for an answer and training must not.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from image_classification.config import SettingError
from image_classification.extras import optional_import
from image_classification.file_writing import write_text
from image_classification.observe.figures import curves

_EXPERIMENT = "lucidprune"
_MOST_PARAMETERS = 100  # largest number that MLflow accepts at a time
_LONGEST_PARAMETER = 500
_PAUSE = 300.0  # seconds before a failed tracker is tried again


class _Tracker:
    """Base of both trackers: the axis, and the handling of failures."""

    setting = ""

    def __init__(self) -> None:
        self._iteration = 0
        self._warned = False
        self._resting_until = 0.0

    def log(
        self, step: Sequence[int] | str, data: Mapping[str, object], iteration: int | None = None
    ) -> None:
        """See `Output`. After a failure, nothing is sent for a while."""
        self._iteration = self._iteration if iteration is None else iteration
        if time.monotonic() < self._resting_until:
            return
        figures = curves(step, data)
        with self._writing():
            if isinstance(step, str):
                self._log_parameters(data)
            elif figures:
                self._log_figures(figures)

    def _log_parameters(self, data: Mapping[str, object]) -> None:
        raise NotImplementedError

    def _log_figures(self, figures: Mapping[str, float]) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def _opening(self, value: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library and its network code may raise anything
            problem = (
                f"cannot be opened: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
            raise SettingError(self.setting, value, problem) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above; hours of training are worth more than a curve
            if not self._warned:
                warnings.warn(
                    f"--{self.setting}: figures are missing there ({error}); it is tried again every "
                    f"{_PAUSE / 60:g} minutes",
                    stacklevel=2,
                )
            self._warned, self._resting_until = True, time.monotonic() + _PAUSE


class MlflowTracker(_Tracker):
    """A run in MLflow, in the experiment named by MLFLOW_EXPERIMENT_NAME, or "lucidprune".

    Args:
        uri: Tracking server or `sqlite:///FILE`; a folder contains such a database.
        workspace: Folder that stores the run's id.
        append: Continue that run.

    Raises:
        SettingError: MLflow is not installed, or cannot be reached.
    """

    setting = "mlflow"

    def __init__(self, uri: str, workspace: Path, *, append: bool) -> None:
        super().__init__()
        with optional_import():
            import mlflow
        noted = workspace / "mlflow_run.txt"
        with self._opening(uri):
            self._entities: ModuleType = mlflow.entities
            self._client: Any = mlflow.MlflowClient(tracking_uri=_database(uri))
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
            experiment = self._client.get_experiment_by_name(name)
            place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            if append and noted.is_file():
                self._run: str = noted.read_text().strip()
                self._client.update_run(self._run, status="RUNNING")
            else:
                self._run = self._client.create_run(place, run_name=workspace.resolve().name).info.run_id
                write_text(noted, self._run + "\n")

    def _log_figures(self, figures: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(key, value, now, self._iteration) for key, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def _log_parameters(self, data: Mapping[str, object]) -> None:
        known = set(self._client.get_run(self._run).data.params)  # parameters of a resumed run cannot change
        parameters = [
            self._entities.Param(key, str(value)[:_LONGEST_PARAMETER])
            for key, value in data.items()
            if key not in known
        ]
        for begin in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self._run, params=parameters[begin : begin + _MOST_PARAMETERS])

    def flush(self) -> None:
        """See `Output`; every figure is written at once."""

    def close(self) -> None:
        """See `Output`."""
        with self._writing():
            self._client.set_terminated(self._run)


def _database(uri: str) -> str:
    """Return the database in a folder, since MLflow no longer keeps runs in plain files."""
    if "://" in uri or uri.startswith("sqlite:"):
        return uri
    Path(uri).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{Path(uri).resolve() / 'mlflow.db'}"


class WandbTracker(_Tracker):
    """A run in Weights & Biases; WANDB_MODE=offline keeps it in the workspace.

    Args:
        project: Name of the project.
        workspace: Folder of its files and the run's id.
        append: Continue that run.

    Raises:
        SettingError: The package is not installed, or the service cannot be reached.
    """

    setting = "wandb"

    def __init__(self, project: str, workspace: Path, *, append: bool) -> None:
        super().__init__()
        with optional_import():
            import wandb
        noted = workspace / "wandb_run.txt"
        with self._opening(project):
            workspace.mkdir(parents=True, exist_ok=True)
            known = noted.read_text().strip() if append and noted.is_file() else None
            self._run: Any = wandb.init(
                project=project, dir=str(workspace), id=known, resume="allow", name=workspace.resolve().name
            )
            self._run.define_metric("*", step_metric="iteration")
            write_text(noted, f"{self._run.id}\n")

    def _log_parameters(self, data: Mapping[str, object]) -> None:
        self._run.config.update(dict(data), allow_val_change=True)

    def _log_figures(self, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "iteration": self._iteration})

    def flush(self) -> None:
        """See `Output`; the library writes in the background."""

    def close(self) -> None:
        """See `Output`."""
        with self._writing():
            self._run.finish()
