"""Figures in MLflow and Weights & Biases, kept in files: what is written, also by a run that is resumed."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from image_classification.config import SettingError
from image_classification.observe.log import LogConfig, Logger
from image_classification.observe.trackers import MlflowTracker, WandbTracker


def write(config: LogConfig, workspace: Path, *, first: int, append: bool) -> None:
    with Logger(config, workspace, append=append) as logger:
        logger.log_parameters({"lr": 0.1, "arch": "resnet20"})
        for iteration in range(first, first + 3):
            figures = {"train.loss": 1 / iteration, "train.nan": math.nan, "train.word": "x"}
            logger.log((0, iteration), figures, iteration)
        logger.log((0,), {"val.top1": 90.0 + first}, first + 2)


def test_mlflow_holds_the_figures_of_a_resumed_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    config = LogConfig(raport_file="", console="plain", mlflow=str(tmp_path / "runs"))
    write(config, tmp_path / "job", first=1, append=False)
    write(config, tmp_path / "job", first=4, append=True)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lucidprune").experiment_id])
    assert run.data.params == {"lr": "0.1", "arch": "resnet20"}
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert {one.step: one.value for one in losses} == {step: 1 / step for step in range(1, 7)}
    assert run.data.metrics.keys() == {"train/loss", "val/top1"}


def test_wandb_offline_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = LogConfig(raport_file="", console="plain", wandb="lucidprune")
    write(config, tmp_path, first=1, append=False)
    noted = (tmp_path / "wandb_run.txt").read_text()
    time.sleep(1.1)  # the library names files by the second
    write(config, tmp_path, first=4, append=True)
    assert (tmp_path / "wandb_run.txt").read_text() == noted
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{noted.strip()}/*.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 60  # the library's own process writes on for a moment
    while not all(b"train/loss" in path.read_bytes() for path in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("tracker", "library"), [(MlflowTracker, "mlflow"), (WandbTracker, "wandb")])
def test_a_tracker_that_fails_later_is_warned_of_once(
    tracker: Callable[..., Any], library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = MagicMock()
    service.MlflowClient().create_run().info.run_id = "7"
    monkeypatch.setitem(sys.modules, library, service)
    output = tracker("sqlite:///runs.db", tmp_path, append=False)
    log = service.MlflowClient().log_batch if library == "mlflow" else service.init().log
    log.side_effect = ConnectionError("gone")
    service.MlflowClient().set_terminated.side_effect = service.init().finish.side_effect = log.side_effect
    with pytest.warns(UserWarning, match=f"--{tracker.setting}: .*gone"):
        output.log((0, 1), {"train.loss": 1.0}, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output.log((0, 2), {"train.loss": 1.0}, 2)
        output.close()
    assert log.call_count == 1  # it is not asked for some minutes


def test_a_tracker_that_cannot_be_opened_stops_the_job(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(SettingError) as caught:
        MlflowTracker("nonsense://place", tmp_path, append=False)
    assert str(caught.value).startswith("mlflow='nonsense://place'")
