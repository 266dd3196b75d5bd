"""Logger, report, console, TensorBoard and meters."""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console as RichConsole
from torch import nn

from image_classification.config import ConfigError
from image_classification.file_writing import unused_path
from image_classification.observe.console import Console
from image_classification.observe.figures import FIGURES, Figure
from image_classification.observe.json_report import Report, read_report
from image_classification.observe.log import LogConfig, Logger
from image_classification.observe.meters import StepClock, latency_figures

ROOT = Path(__file__).resolve().parent.parent


def console(print_freq: int = 10, live: bool = False, **options: object) -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    rich_console = RichConsole(file=screen, force_terminal=live, width=200, soft_wrap=True)
    return Console(print_freq, live=live, rich_console=rich_console, **options), screen


class TestReport:
    def test_lines_are_those_of_the_field(self, tmp_path):
        report = Report(tmp_path / "sub" / "raport.json")
        report.describe("train.loss", Figure(".5f", "s"))
        report.log((3, 100), {"train.loss": 0.5, "array": np.float32(0.25), "tensor": torch.tensor([1, 2])})
        report.log((3,), {"val.top1": math.nan, "inf": math.inf})
        report.log((), {})
        report.log("PARAMETER", {"lr": 0.1, "path": Path("a"), "nested": {"sizes": (1, 2)}})
        report.close()
        lines = [json.loads(line) for line in (tmp_path / "sub" / "raport.json").read_text().splitlines()]
        assert [line["type"] for line in lines] == ["METADATA", "LOG", "LOG", "LOG", "LOG"]
        assert lines[0]["metric"] == "train.loss"
        assert lines[0]["metadata"] == {"unit": "s", "format": ":.5f"}
        assert lines[1]["step"] == [3, 100]
        assert lines[1]["data"] == {"train.loss": 0.5, "array": 0.25, "tensor": [1, 2]}
        assert lines[2]["data"] == {"val.top1": None, "inf": None}
        assert lines[3]["step"] == []
        assert lines[4]["step"] == "PARAMETER"
        assert lines[4]["data"] == {"lr": 0.1, "path": "a", "nested": {"sizes": [1, 2]}}
        for line in lines:
            assert float(line["timestamp"]) > 1.7e9
            assert 0 <= float(line["elapsedtime"]) < 60
            assert re.match(r"\d{4}-\d\d-\d\d \d\d:", line["datetime"])
        assert read_report(tmp_path / "sub" / "raport.json") == lines

    def test_new_run_keeps_the_old_report_and_a_resumed_one_goes_on(self, tmp_path):
        path = tmp_path / "raport.json"
        for number, append in ((1, False), (2, True), (3, False)):
            report = Report(path, append=append)
            report.log((number,), {})
            report.close()
        assert [entry["step"] for entry in read_report(tmp_path / "raport.1.json")] == [[1], [2]]
        assert [entry["step"] for entry in read_report(path)] == [[3]]

    def test_line_torn_by_a_kill_costs_only_itself(self, tmp_path):
        path = tmp_path / "raport.json"
        path.write_text('{"type": "LOG", "step": [0]}\n{"type": "LOG", "st')
        report = Report(path, append=True)
        report.log((1,), {})
        report.close()
        assert [entry["step"] for entry in read_report(path)] == [[0], [1]]

    def test_reads_dllogger(self, tmp_path):
        (tmp_path / "old.json").write_text('DLLL {"type": "LOG", "step": [], "data": {"val.top1": 76.0}}\n')
        assert read_report(tmp_path / "old.json")[0]["data"] == {"val.top1": 76.0}

    def test_report_that_cannot_be_opened_stops_before_training(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="raport_file="):
            Logger(LogConfig(raport_file="file/raport.json"), tmp_path)
        (tmp_path / "folder").mkdir()
        with pytest.raises(ConfigError, match="raport_file="):
            Logger(LogConfig(raport_file="folder"), tmp_path)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_full_disk_warns_once_and_training_goes_on(self):
        report = Report(Path("/dev/full"))
        with pytest.warns(UserWarning, match="/dev/full"):
            report.log((0, 1), {"train.loss": 1.0})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report.log((0, 2), {"train.loss": 1.0})
            report.close()

    def test_first_free_name(self, tmp_path):
        names = []
        for _ in range(3):
            path = unused_path(tmp_path / "a.json")
            path.touch()
            names.append(path.name)
        assert names == ["a.json", "a.1.json", "a.2.json"]


def test_documented_keys_are_the_logged_keys_with_their_units():
    for owner in (
        "pruning.training.main_job",
        "explainers.aem.selector_callbacks",
        "explainers.casm.casm_trainer",
    ):
        importlib.import_module(owner)
    rows = re.findall(
        r"^\| `(\w+\.\w+)` \| ?(.*?) ?\|", (ROOT / "docs" / "report-keys.md").read_text(), re.MULTILINE
    )
    # What pruning logs is its own: image_classification does not know it.
    documented = {
        key: unit or None for key, unit in rows if key.partition(".")[0] not in ("pruning", "score", "width")
    }
    described_together = ("pruning", "gates", "val_ema")
    logged = {
        key: figure.unit for key, figure in FIGURES.items() if key.partition(".")[0] not in described_together
    }
    assert documented == logged


class TestStepClock:
    def run(self, num_warmup: int) -> tuple[dict[str, float], dict[str, float]]:
        """Four iterations of 8 images with 1 s of waiting and 3 s of work; the first two take 10 s longer."""
        now = [0.0]
        clock = StepClock(world_size=2, num_warmup=num_warmup, clock=lambda: now[0])
        for step in range(4):
            now[0] += 1.0
            clock.data_ready()
            now[0] += 3.0 + (10.0 if step < 2 else 0.0)
            clock.step_done(8)
        return clock.read(), clock.read_epoch()

    def test_rates_and_times(self):
        window, epoch = self.run(num_warmup=0)
        assert window == epoch
        assert window["train.total_ips"] == pytest.approx(2 * 32 / 36)
        assert window["train.compute_ips"] == pytest.approx(2 * 32 / 32)
        assert window["train.data_time"] == pytest.approx(1.0)
        assert window["train.compute_time"] == pytest.approx(8.0)

    def test_warm_up_is_left_out(self):
        _, epoch = self.run(num_warmup=2)
        assert epoch["train.total_ips"] == pytest.approx(2 * 16 / 8)
        assert epoch["train.compute_time"] == pytest.approx(3.0)

    def test_pauses_are_left_out_by_starting_again(self):
        now = [0.0]
        clock = StepClock(clock=lambda: now[0])
        now[0] += 100.0
        clock.start()
        now[0] += 2.0
        clock.data_ready()
        clock.step_done(4)
        assert clock.read("val")["val.total_ips"] == pytest.approx(2.0)
        assert clock.read() == {}


def test_latency_percentiles_are_measured_values():
    rng = np.random.default_rng(0)
    seconds = rng.exponential(size=237)
    figures = latency_figures(list(seconds))
    assert figures["val.compute_latency"] == pytest.approx(seconds.mean())
    for percent in (50, 95, 99, 100):
        expected = np.quantile(seconds, percent / 100, method="inverted_cdf")
        assert figures[f"val.compute_latency_at{percent}"] == expected
    assert latency_figures([]) == {}
    assert latency_figures([0.5], "val_ema")["val_ema.compute_latency_at99"] == 0.5


class TestConsole:
    def test_plain_lines_every_print_freq_and_at_the_end(self):
        plain, screen = console(print_freq=10)
        with plain.progress(25, "Train 1/3") as task:
            for step in range(25):
                task.update({"loss": 2.0} if step == 9 else None)
        lines = screen.getvalue().splitlines()
        assert [re.search(r"\[(\d+)/25\]", line).group(1) for line in lines] == ["10", "20", "25"]
        assert all("loss 2" in line and "ETA 0:00:0" in line for line in lines)
        assert "\x1b" not in screen.getvalue()

    def test_epoch_line_has_units_and_formats(self):
        plain, screen = console()
        plain.log((3, 10), {"val.top1": 1.0})
        plain.log((3,), {"val.top1": 76.123, "pruning.num_groups": 36, "name": "resnet50"})
        plain.log((), {"val.top1": 77.0})
        assert screen.getvalue().splitlines() == [
            "Epoch 3:  val.top1 76.12 %",
            "Summary:  val.top1 77.00 %",
        ]

    @pytest.mark.parametrize("live", [False, True])
    def test_quiet_shows_messages_and_the_summary_alone(self, live, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK_ON_TERMINAL", "1")
        monkeypatch.setenv("RANK_LOG", str(tmp_path / "rank_0.log"))
        quiet, screen = console(print_freq=1, live=live, detail="quiet")
        with quiet.progress(1, "Train 1/3") as task:
            task.update({"loss": 2.0})
        quiet.message("a message")
        quiet.log((3,), {"val.top1": 76.123})
        quiet.log((), {"val.top1": 77.0})
        quiet.close()
        assert screen.getvalue().splitlines() == ["a message", "Summary:  val.top1 77.00 %"]
        assert "Epoch 3:" in (tmp_path / "rank_0.log").read_text()
        assert "Train 1/3" in (tmp_path / "rank_0.log").read_text()

    def test_verbose_shows_every_figure_of_an_epoch(self):
        plain, screen = console(detail="verbose")
        plain.log((3,), {"val.top1": 76.123, "pruning.num_groups": 36})
        assert screen.getvalue() == "Epoch 3:  val.top1 76.12 %  pruning.num_groups 36\n"

    def test_quiet_and_verbose_contradict_each_other(self):
        with pytest.raises(ValueError, match="--quiet and --verbose"):
            LogConfig(quiet=True, verbose=True)

    def test_long_lines_and_markup_are_left_alone(self):
        plain, screen = console()
        text = "[red]not markup[/red] " + "x" * 500
        plain.message(text)
        assert screen.getvalue() == text + "\n"

    def test_live_display_is_down_before_a_traceback(self):
        live, screen = console(live=True)

        def train() -> None:
            with live.progress(5, "Train") as task:
                task.update({"loss": 1.5})
                time.sleep(0.3)  # the display is drawn four times a second
                live.message("a message")
                raise ValueError("boom")

        with pytest.raises(ValueError, match="boom"):
            train()
        text = screen.getvalue()
        assert "loss 1.5" in text
        assert "a message" in text
        assert text.rindex("\x1b[?25h") > text.rindex("Train")  # the cursor is shown again, last of all

    def test_nested_displays(self):
        live, screen = console(live=True)
        with live.progress(2, "Train") as outer:
            with live.progress(3, "Validate") as inner:
                inner.update(advance=3)
            outer.update(advance=2)
        text = screen.getvalue()
        assert "Validate" in text
        assert text.rindex("\x1b[?25h") > text.rindex("Train")

    def test_log_of_the_rank_on_a_terminal(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK_ON_TERMINAL", "1")
        monkeypatch.setenv("RANK_LOG", str(tmp_path / "rank_0.log"))
        live, _ = console(print_freq=2, live=True)
        with live.progress(4, "Train") as task:
            for _ in range(4):
                task.update()
        live.message("done")
        live.close()
        lines = (tmp_path / "rank_0.log").read_text().splitlines()
        assert [line.split("  ")[0] for line in lines] == ["Train [2/4]", "Train [4/4]", "done"]


class TestLogger:
    @pytest.fixture
    def logger(self, tmp_path):
        with Logger(LogConfig(raport_file="r.json", tensorboard="tb", console="plain"), tmp_path) as logger:
            yield logger

    def events(self, folder: Path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(folder))
        accumulator.Reload()
        return accumulator

    def test_report_describes_every_key(self, logger, tmp_path):
        metadata = {
            e["metric"]: e["metadata"] for e in read_report(tmp_path / "r.json") if e["type"] == "METADATA"
        }
        assert metadata["train.total_ips"] == {"unit": "img/s", "format": ":.2f"}
        assert set(metadata) == {key for key, figure in FIGURES.items() if figure.format or figure.unit}

    def test_figures_reach_every_output(self, logger, tmp_path, capsys):
        logger.log_parameters({"lr": 0.1})
        logger.log((0, 1), {"train.loss": 2.0}, iteration=11)
        logger.scalars("pruning", {"macs": 5}, (0, 1))
        logger.log((0,), {"train.loss": 1.5, "val.top1": 50.0}, iteration=20)
        logger.flush()
        entries = [e for e in read_report(tmp_path / "r.json") if e["type"] == "LOG"]
        assert [e["step"] for e in entries] == ["PARAMETER", [0, 1], [0, 1], [0]]
        assert entries[2]["data"] == {"pruning.macs": 5}
        events = self.events(tmp_path / "tb")
        points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert points == {
            "train/loss": [(11, 2.0)],
            "pruning/macs": [(11, 5.0)],
            "train/loss_epoch": [(20, 1.5)],
            "val/top1": [(20, 50.0)],
        }
        assert "Epoch 0:  train.loss 1.50000  val.top1 50.00 %" in capsys.readouterr().out

    def test_settings_stand_beside_the_last_figures_in_tensorboard(self, logger, tmp_path):
        from tensorboard.plugins.hparams import plugin_data_pb2

        logger.log_parameters(
            {"lr": 0.1, "arch": "resnet20", "budget": ["macs=0.5"], "amp": True, "seed": None}
        )
        logger.log((0,), {"val.top1": 50.0}, iteration=10)
        logger.log((1,), {"val.top1": 60.0}, iteration=20)
        logger.log((), {"pruning.macs_before": 8.0, "pruning.macs_after": 4.0})
        logger.close()
        summaries = self.events(tmp_path / "tb").summary_metadata
        read = {
            tag: plugin_data_pb2.HParamsPluginData.FromString(value.plugin_data.content)
            for tag, value in summaries.items()
            if value.plugin_data.plugin_name == "hparams"
        }
        start = read["_hparams_/session_start_info"].session_start_info.hparams
        assert start["lr"].number_value == 0.1
        assert start["arch"].string_value == "resnet20"
        assert start["amp"].string_value == "True"
        assert start["budget"].string_value == "['macs=0.5']"
        shown = read["_hparams_/experiment"].experiment.metric_infos
        assert {each.name.tag for each in shown} == {"val/top1", "pruning/macs_before", "pruning/macs_after"}

    def test_images_histograms_and_graph(self, logger, tmp_path):
        from torchvision.io import write_png

        image = (torch.rand(3, 8, 9) * 255).to(torch.uint8)
        write_png(image, str(tmp_path / "p.png"))
        logger.image("a", image, 1)
        logger.image("b", tmp_path / "p.png", 1)
        logger.histogram("weights", torch.tensor([1.0, math.nan, 2.0]), 1)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2)
        )
        model[1].eval()
        mean = model[1].running_mean.clone()
        images = torch.rand(2, 3, 8, 8)
        state = torch.get_rng_state()
        logger.graph(model, images)
        assert [module.training for module in model] == [True, False, True, True, True]
        assert torch.equal(mean, model[1].running_mean)
        logger.flush()
        events = self.events(tmp_path / "tb")
        assert set(events.Tags()["images"]) == {"a", "b"}
        assert events.Tags()["histograms"] == ["weights"]
        assert events.Tags()["graph"]
        assert torch.equal(state, torch.get_rng_state())

    def test_network_that_cannot_be_traced_is_a_message(self, logger, capsys):
        class Untraceable(nn.Module):
            def forward(self, x):
                raise RuntimeError("no trace today")

        logger.graph(Untraceable(), torch.rand(1, 3, 4, 4))
        assert "no graph in TensorBoard, tracing failed" in capsys.readouterr().out

    def test_other_ranks_write_and_show_nothing(self, tmp_path, capsys):
        logger = Logger(LogConfig(tensorboard="tb"), tmp_path, is_main=False)
        logger.log_parameters({})
        logger.log((0,), {"train.loss": 1.0})
        logger.image("a", torch.rand(3, 4, 4), 0)
        logger.histogram("a", torch.rand(3), 0)
        logger.graph(nn.Identity(), torch.rand(1))
        logger.message("hello")
        with logger.progress(3, "Train") as task:
            task.update({"loss": 1.0})
        logger.flush()
        logger.close()
        assert list(tmp_path.iterdir()) == []
        assert capsys.readouterr() == ("", "")

    def test_no_report_when_switched_off(self, tmp_path):
        Logger(LogConfig(raport_file="", console="plain"), tmp_path).close()
        assert list(tmp_path.iterdir()) == []

    def test_print_freq_is_checked(self):
        with pytest.raises(ConfigError, match="--print-freq 0"):
            LogConfig(print_freq=0)


def test_a_report_that_is_removed_is_written_again(tmp_path: Path) -> None:
    """Its folder with it: what the open file held comes back, and the next line too."""
    folder = tmp_path / "run"
    report = Report(folder / "report.json")
    report.log((0, 1), {"train.loss": 2.0})
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match=r"report\.json"):
        report.log((0, 2), {"train.loss": 1.0})
    report.log((0, 3), {"train.loss": 0.5})
    report.close()
    assert [entry["step"] for entry in read_report(folder / "report.json")] == [[0, 1], [0, 2], [0, 3]]
