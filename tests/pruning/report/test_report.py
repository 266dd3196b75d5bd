"""The report of a run: what it says is what the run's files say, and what is missing is said."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.commands import run_here

from explainers.attribution.record import UnsupportedOperatorError
from image_classification.inference_speed import SpeedRow
from image_classification.models import read_safely
from image_classification.observe.json_report import read_report
from pruning.__main__ import main
from pruning.report import charts, content, speed, wording
from pruning.report.lineage import Lineage, Stage, find_lineage, rewrites_of
from pruning.report.networks import Network
from pruning.report.page import render
from pruning.report.rewrite_tables import score_table, width_table
from pruning.report.speed import compare_speed
from pruning.report.trajectory import Trajectory, last_accuracy, trajectory_of
from pruning.report.verdict import verdict

DATA = "shapes:train=96,val=24"
SMALL = [
    "--image-size",
    "24",
    "--batch-size",
    "16",
    "--workers",
    "1",
    "--data-backend",
    "pytorch",
    "--console",
    "plain",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages: training, pruning, fine-tuning."""
    root = tmp_path_factory.mktemp("report")
    stages: dict[str, list[str]] = {
        "pretrain": ["--epochs", "1"],
        "prune": [
            *("--epochs", "1", "--iterative-pruning", "--pruning-step", "2", "--pruning-delta", "0.2"),
            *("--budget", "macs=0.6", "--calibration-batches", "1", "--calibration-size", "24"),
            *("--pretrained-weights", str(root / "runs/pretrain/checkpoint.pth.tar")),
        ],
        "finetune": ["--epochs", "2", "--pretrained-weights", str(root / "runs/prune/checkpoint.pth.tar")],
    }
    for name, flags in stages.items():
        words = [
            sys.executable,
            "main.py",
            DATA,
            "--arch",
            "resnet20",
            *SMALL,
            "--workspace",
            str(root / "runs" / name),
        ]
        done = run_here([*words, *flags], root / "cache")
        assert done.returncode == 0, done.stderr[-2000:]
    return root / "runs"


@pytest.fixture(scope="module")
def report(runs: Path) -> tuple[str, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUCIDPRUNE_CACHE", str(runs.parent / "cache"))
        words = ["report", str(runs), "--num-images", "12", "--num-batches", "5", "--batch-sizes", "1", "2"]
        assert main([*words, "--device", "cpu"]) == 0
    return (runs / "report.html").read_text(encoding="utf-8"), json.loads((runs / "report.json").read_text())


def test_the_stages_are_found_from_the_folder_and_from_the_last_run(runs: Path) -> None:
    for start in (runs, runs / "finetune"):
        lineage = find_lineage(start)
        assert [stage.workspace.name for stage in lineage.stages] == ["pretrain", "prune", "finetune"]
        assert [stage.kind for stage in lineage.stages] == ["training", "pruning", "fine-tuning"]
        assert lineage.original_weights() == runs / "pretrain" / "checkpoint.pth.tar"
    assert [stage.kind for stage in find_lineage(runs / "pretrain").stages] == ["training"]


def test_figures_are_those_of_the_run(runs: Path, report: tuple[str, dict[str, Any]]) -> None:
    _, plain = report
    history = read_safely(runs / "prune" / "checkpoint.pth.tar")["callbacks"]["pruning"]["history"]
    assert [row["widths"] for row in plain["rewrites"]] == [record["widths"] for record in history]
    steps = 96 // 16
    assert [row["iteration"] for row in plain["rewrites"]] == [
        steps + record["iteration"] for record in history
    ]
    (budget,) = plain["budget"]
    assert budget["metric"] == "macs"
    assert budget["asked"] == 0.6
    _, after, base = history[-1]["costs"]["macs"]
    assert budget["reached"] == pytest.approx(after / base)
    costs = {row["metric"]: row for row in plain["costs"]}
    assert costs["macs"]["before"] == base
    assert costs["macs"]["after"] == after
    weights = read_safely(runs / "finetune" / "checkpoint.pth.tar")["state_dict"]
    widths = {row["layer"]: row["after"] for row in plain["widths"]}
    assert all(width == weights[f"{layer}.weight"].shape[0] for layer, width in widths.items())
    assert [row["when"] for row in plain["accuracy"]] == [
        "before pruning",
        "after pruning",
        "after fine-tuning",
    ]
    logged = [
        entry["data"]
        for entry in read_report(runs / "finetune" / "experiment_raport.json")
        if "data" in entry
    ]
    last = [data["val.top1"] for data in logged if "val.top1" in data][-1]
    assert plain["accuracy"][-1]["top1"] == last
    (uncontrolled,) = plain["missing"]
    more = plain["accuracy"][-1]["epochs"] - plain["accuracy"][0]["epochs"]
    assert more > 0
    assert f"was trained {wording.counted(more, 'epoch')} longer than the one before pruning" in uncontrolled
    pruning = yaml.safe_load((runs / "prune" / "config.yaml").read_text())
    assert plain["criterion"] == pruning["pruning_criterion"], "not the fine-tuning's"


def test_explanations_speed_and_origin_are_there(report: tuple[str, dict[str, Any]]) -> None:
    _, plain = report
    assert {row["network"] for row in plain["explanations"]["localization"]} == {"original", "pruned"}
    assert plain["explanations"]["num_images"] == 12
    drift = plain["explanations"]["drift"]
    assert [row["similarity"] for row in drift] == ["rank_correlation", "ssim"]
    assert all(row["mean"] is None or -1 <= row["p10"] <= row["mean"] <= 1 for row in drift)
    assert {(row["network"], row["batch_size"]) for row in plain["speed"]} == {
        ("original", 1),
        ("pruned", 1),
        ("original", 2),
        ("pruned", 2),
    }
    assert {row["num_batches"] for row in plain["speed"]} != {0}
    assert all(row["load"] >= 0 for row in plain["speed"])
    for stage in plain["stages"]:
        assert stage["commands"][0].startswith("python ")
        assert "main.py" in stage["commands"][0]
        assert stage["environment"]["processor"]
    assert plain["config"]["arch"] == "resnet20"


class _Page(HTMLParser):
    """Checks that tags close, ids are unique and nothing is fetched."""

    VOID = frozenset("meta img br path use rect image line link stop".split())

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href") and not str(value).startswith(("data:", "#")):
                self.fetched.append(str(value))
            if tag == "img" and name == "src":
                assert any(key == "alt" and text for key, text in attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(report: tuple[str, dict[str, Any]]) -> None:
    text, _ = report
    parser = _Page()
    parser.feed(text)
    assert parser.open == []
    assert parser.fetched == []
    assert len(parser.ids) == len(set(parser.ids)) > 50
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"#0a0[bc]0", text), "a stand-in colour was not replaced"
    assert "prefers-color-scheme: dark" in text
    references = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert references <= set(parser.ids)
    assert text.count('<svg class="wide"') == text.count('<svg class="narrow"') == 4


def test_what_a_lonely_run_lacks_is_listed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that pruned without pretrained weights, whose data has gone."""
    lonely = tmp_path / "lonely"
    shutil.copytree(runs / "prune", lonely)
    config = yaml.safe_load((lonely / "config.yaml").read_text())
    config |= {"pretrained_weights": None, "data": str(tmp_path / "gone")}
    (lonely / "config.yaml").write_text(yaml.safe_dump(config))
    (lonely / "invocations.jsonl").unlink()
    out = tmp_path / "page.html"
    words = ["report", str(lonely), "--skip", "speed", "--output", str(out), "--device", "cpu"]
    assert main([*words, "--data", str(tmp_path / "moved")]) == 2  # what was asked for is not passed over
    assert f"{tmp_path / 'moved'}" in capsys.readouterr().err
    assert main(words) == 0
    plain = json.loads(out.with_suffix(".json").read_text())
    assert any("never existed" in line for line in plain["missing"])
    assert any("data cannot be opened" in line for line in plain["missing"])
    assert plain["explanations"] is None
    assert plain["speed"] == []
    assert [row["when"] for row in plain["accuracy"]] == ["after pruning"]
    assert (
        plain["costs"][0]["before"] > plain["costs"][0]["after"]
    )  # the architecture's name knows the widths
    text = out.read_text()
    assert "What this run does not tell" in text
    assert "The command was not recorded." in text


def test_errors_name_the_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
    for name in ("one", "two"):
        (tmp_path / "many" / name).mkdir(parents=True)
        (tmp_path / "many" / name / "config.yaml").write_text("arch: resnet20\ndata: shapes\n")
    assert main(["report", str(tmp_path / "many")]) == 2
    assert "several results" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "many" / "one")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert main(["report", str(runs), "--num-images", "0"]) == 2
    assert "--num-images 0" in capsys.readouterr().err


def test_a_line_written_twice_counts_once(runs: Path) -> None:
    """A resumed run repeats iterations after its last checkpoint: the later line holds."""
    (stage,) = find_lineage(runs / "pretrain").stages
    once = trajectory_of([stage])
    stage.entries.extend(json.loads(json.dumps(stage.entries)))
    for entry in stage.entries[len(stage.entries) // 2 :]:
        if "val.top1" in entry.get("data", {}):
            entry["data"]["val.top1"] = 77.0
    twice = trajectory_of([stage])
    assert len(twice.validation) == len(once.validation) == 1
    assert twice.validation[0][1] == 77.0
    assert last_accuracy(stage)["top1"] == 77.0  # type: ignore[index]


def test_tables_of_widths_and_scores() -> None:
    rewrites = [
        {"number": 1, "iteration": 5, "widths": {"a": [8, 6]}},
        {"number": 2, "iteration": 9, "widths": {"b": [4, 1], "a": [6, 2]}},
    ]
    groups, shares = width_table(rewrites)
    assert groups == ["a", "b"]
    np.testing.assert_allclose(shares, [[0.75, 0.25], [1.0, 0.25]])
    names, values = score_table(rewrites, Trajectory(scores={"c": [[5, 0.5], [7, 9.0], [9, 0.25]]}))
    assert names == ["c"]
    np.testing.assert_allclose(values, [[0.5, 0.25]])


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 3, "–"),
        (float("inf"), 3, "∞"),
        (0, 3, "0"),
        (1234567.0, 3, "1,234,567"),
        (0.012345, 3, "0.0123"),
        (99.96, 4, "99.96"),
    ],
)
def test_numbers_for_people(value: float | None, digits: int, text: str) -> None:
    assert wording.number(value, digits) == text


def test_words_for_people() -> None:
    assert wording.date("2026-11-29T16:05:31+00:00") == "29 November 2026, 16:05 UTC"
    assert wording.date("2026-01-02T23:30:00-02:00") == "3 January 2026, 01:30 UTC"
    assert wording.date("2026-01-02T23:30:00") == "2 January 2026, 23:30"
    assert wording.counted(1, "rewrite") == "1 rewrite"
    assert wording.counted(0, "process", "processes") == "0 processes"
    assert wording.counted(1200, "thread") == "1,200 threads"
    assert wording.number(100.0, 2) == "100"
    assert wording.change(1.0, 1.0).startswith("±0")


@pytest.mark.parametrize(("right", "count"), [(0, 20), (10, 20), (294, 300), (300, 300)])
def test_the_interval_is_where_the_share_is_within_two_deviations(right: int, count: int) -> None:
    """Wilson's interval holds the true shares from which the counted one is less than 1.96 deviations away."""
    share = right / count
    low, high = wording.interval(share, count)
    assert -1e-12 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1 + 1e-12
    for edge in (low, high):
        if 1e-9 < edge < 1 - 1e-9:
            assert abs(share - edge) == pytest.approx(1.96 * (edge * (1 - edge) / count) ** 0.5)


def test_a_single_rewrite_is_bars() -> None:
    groups = ["a", "b"]
    one = charts.rewrites(np.array([[0.5], [1.0]]), groups, [1])
    several = charts.rewrites(np.array([[0.5, 0.5], [1.0, 0.2]]), groups, [1, 2])
    assert one is not None
    assert several is not None
    for form in ("wide", "narrow"):
        assert "<image" not in one[form]
        assert "<image" in several[form]


def test_the_verdict_comes_first_and_says_what_is_not_known(
    runs: Path, report: tuple[str, dict[str, Any]]
) -> None:
    text, plain = report
    found = verdict(plain)
    assert text.index('class="verdict"') < text.index('class="cards"')
    assert found["path"] == str(runs / "finetune" / "checkpoint.pth.tar")
    names: dict[str, Any] = {}
    exec(compile(found["code"], "report", "exec"), names)
    assert not names["model"].training
    lines = dict(found["lines"])
    assert f"{plain['accuracy'][-1]['top1']:.1f} %" in lines["Accuracy"]
    assert "24 images" in lines["Accuracy"]
    assert "not what pruning costs" in lines["Accuracy"]
    assert "of 12 validation images" in lines["Same answers"]
    for batch in (1, 2):
        assert "median of 5 batches" in lines[f"Latency, batch {batch}"]
    assert "not what pruning costs" not in dict(verdict(trained_as_long(plain))["lines"])["Accuracy"]


@pytest.mark.parametrize(("load", "warned"), [(0.9, False), (3.2, True), (None, False)])
def test_times_of_a_busy_machine_come_with_a_warning(
    report: tuple[str, dict[str, Any]], load: float | None, warned: bool
) -> None:
    plain = report[1]
    plain = {**plain, "speed": [{**row, "load": load} for row in plain["speed"]]}
    lines = dict(verdict(plain)["lines"])
    assert ("Busy machine" in lines) == warned
    if warned:
        assert "3.2 processes per core" in lines["Busy machine"]


def test_the_card_of_speed_has_the_range_over_batch_sizes(report: tuple[str, dict[str, Any]]) -> None:
    plain = report[1]
    medians = {(1, "original"): 0.006, (1, "pruned"): 0.004, (2, "original"): 0.01, (2, "pruned"): 0.008}
    speed = [{**row, "p50": medians[row["batch_size"], row["network"]]} for row in plain["speed"]]
    page = render(content.Content({**plain, "speed": speed}, Trajectory(), []))
    assert "<b>1.25–1.50×</b>" in page  # and not in the order of the batches


def test_sensitivity_is_shown_where_it_was_measured(
    report: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    page, plain = report
    assert "Sensitivity" not in page
    rows = [{"group": "layer9.conv1", "width": 16, "losses": [0.125, None]}]
    measured = {"groups": rows, "removed": [0.5, 0.9], "repair": "none", "num_images": 8, "command": ""}
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "sensitivity.json").write_text(json.dumps(measured))
    missing: list[str] = []
    found = content.read_sensitivity(
        [tmp_path, tmp_path / "prune"], missing
    )  # a folder of runs, and a run in it
    whole = content.Content({**plain, "sensitivity": found}, Trajectory(), [])
    shown = render(whole)
    assert shown.count("layer9.conv1") == 3  # the chart in both its forms, and the table
    assert "8 images" in shown
    assert not missing


def test_the_card_of_an_upload_has_the_figures(
    runs: Path, report: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    page, plain = report
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "report.json").write_text(json.dumps(plain))
    words = ["upload", plain["network"], "me/net", "--report", str(tmp_path / "report.html")]
    assert main([*words, "--folder", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "report.html").read_text() == page
    card = hub.ModelCard.load(tmp_path / "there" / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(plain["accuracy"][-1]["top1"], abs=0.01)
    assert verdict(plain)["lead"] in card.text


def trained_as_long(plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, "accuracy": [{**row, "epochs": 9} for row in plain["accuracy"]]}


def test_answers_are_compared_class_by_class(report: tuple[str, dict[str, Any]]) -> None:
    text, plain = report
    found = plain["predictions"]
    assert found["num_images"] == sum(row["count"] for row in found["classes"]) == 12
    assert 0 <= found["agreement"] <= 1
    assert all(0 <= row[when] <= 1 for row in found["classes"] for when in ("before", "after"))
    assert text.count("✓") + text.count("✗") == 2 + 2 * 8  # the legend, and two networks over eight images


def test_nothing_is_counted_in_machine_words(report: tuple[str, dict[str, Any]]) -> None:
    text, _ = report
    shown = re.sub(r"<(style|pre|svg).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL)
    assert not re.search(r"\b1 (?:rewrites|threads|cores|processes|images)\b", shown)
    assert not re.search(r"\d\d\d\d-\d\d-\d\dT", shown)
    assert not re.search(r"\de[+-]\d\d", shown)


def test_the_rewrite_of_learned_gates_is_a_rewrite() -> None:
    state = {
        "record": {"widths": {"a": [8, 3]}, "share": {"macs": 0.5}, "loss": [0.1, 0.7], "threshold": 0.5}
    }
    (record,) = rewrites_of({"learned_pruning": state, "recorder": {"count": 3}})
    assert record["widths"] == {"a": [8, 3]}
    assert record["costs"]["macs"] == [1.0, 0.5, 1.0]
    assert rewrites_of({"learned_pruning": {"record": None}}) == []


def stage(**more: Any) -> Stage:
    plain: dict[str, Any] = {
        "workspace": Path("run"),
        "kind": "pruning",
        "config": {},
        "entries": [],
        "invocations": [],
        "checkpoint": None,
        "progress": {"iteration": 10, "steps_per_epoch": 5},
        "rewrites": [],
    }
    return Stage(**(plain | more))


def rewrite(iteration: int, before: float, after: float) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "widths": {},
        "costs": {"macs": [before, after, 100.0]},
        "loss": [0.0, 0.0],
    }


def test_a_second_pruning_stage_goes_on_where_the_first_one_ended() -> None:
    stages = [stage(rewrites=[rewrite(5, 100, 50)]), stage(rewrites=[rewrite(5, 100, 60)])]
    course = trajectory_of(stages)
    np.testing.assert_allclose(
        course.costs["macs"], [[0, 1], [5, 1], [5, 0.5], [10, 0.5], [15, 0.5], [15, 0.3], [20, 0.3]]
    )
    budget = content.budget_table(Lineage(tuple(stages)))
    assert budget == [{"metric": "macs", "asked": 0.25, "reached": pytest.approx(0.3)}]


def test_rates_ask_for_no_cost() -> None:
    config = {"one_shot_pruning": 0.3, "prune_rate": ["layer1.*"]}
    assert content.budget_table(Lineage((stage(config=config, rewrites=[rewrite(0, 100, 80)]),))) == []


def test_a_network_that_a_method_cannot_explain_has_a_report(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedOperatorError("Grad-CAM: no feature map")

    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(runs.parent / "cache"))
    monkeypatch.setattr(content, "explain", refuse)
    words = ["report", str(runs), "--skip", "speed", "accuracy", "--device", "cpu", "--output"]
    assert main([*words, str(tmp_path / "page.html")]) == 0
    missing = json.loads((tmp_path / "page.json").read_text())["missing"]
    assert any("explanations: Grad-CAM: no feature map" in line for line in missing)
    assert "speed: left out as asked (--skip speed)" in missing
    assert main([*words, str(tmp_path / "page.json")]) == 2


@pytest.mark.parametrize("num_batches", [2, 7])
def test_as_many_batches_count_as_were_asked_for(num_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def count(_size: int, seconds: list[float]) -> SpeedRow:
        counts.append(len(seconds))
        return SpeedRow(1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(speed, "speed_row", count)
    networks = [Network(name, torch.nn.Identity(), None) for name in ("original", "pruned")]
    compare_speed(networks, 8, torch.device("cpu"), batch_sizes=(1,), num_batches=num_batches)
    assert counts == [num_batches, num_batches]


def test_a_single_rewrite_is_shown_as_bars() -> None:
    """A heat-map of one column would say nothing; scores that are zero or missing have no bar."""
    shares, values = np.array([[0.5], [0.25]]), np.array([[0.01], [0.0]])
    for several, chart in (
        (np.hstack([shares, shares]), charts.rewrites),
        (np.hstack([values] * 2), charts.scores),
    ):
        single = chart(several[:, :1], ["a", "b"], [1])
        assert single is not None
        assert "rewrite" not in re.findall(r"<text[^>]*>([^<]*)</text>", single["wide"])
        both = chart(several, ["a", "b"], [1, 2])
        assert both is not None
        assert "rewrite" in re.findall(r"<text[^>]*>([^<]*)</text>", both["wide"])


def test_the_chart_of_sensitivity_has_a_row_per_group_and_a_column_per_share() -> None:
    rows = [{"group": "a", "losses": [0.0, 0.5]}, {"group": "b", "losses": [None, 1.0]}]
    drawn = charts.sensitivity({"groups": rows, "removed": [0.1, 0.5]})
    assert drawn is not None
    words = re.findall(r"<text[^>]*>([^<]*)</text>", drawn["narrow"])
    assert {"a", "b", "−10 %", "−50 %", "channels removed"} <= set(words)
    assert charts.sensitivity({"groups": [{"group": "a", "losses": [None]}], "removed": [0.1]}) is None
