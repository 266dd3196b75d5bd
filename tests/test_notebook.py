"""What notebooks show, and the tutorial notebook, executed cell by cell without Jupyter."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from support.commands import ROOT
from torch import nn

from image_classification.observe.html_table import MAX_ROWS, html_table
from pruning import Pruner, shrink
from pruning.repair.repairing import RepairedLayer, RepairReport

NOTEBOOK = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))


def pruner_of_a_small_network() -> Pruner:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
    )
    return Pruner(model, torch.randn(2, 3, 8, 8), budget={"macs": 0.6}, delta=0.2, criterion="magnitude")


def test_what_is_shown_is_escaped() -> None:
    shown = html_table("<title>", ("<column>",), [("<cell>",), (None,)], ["<note>"])
    assert "<title>" not in shown
    assert "<column>" not in shown
    assert "<cell>" not in shown
    assert "<note>" not in shown
    assert "&lt;cell&gt;" in shown


def test_long_tables_say_what_they_leave_out() -> None:
    shown = html_table("many", ("number",), [(number,) for number in range(MAX_ROWS + 3)])
    assert shown.count("<tr>") == MAX_ROWS + 1
    assert "3 more" in shown


def test_objects_show_themselves() -> None:
    pruner = pruner_of_a_small_network()
    assert pruner.graph.prunable[0].name in pruner.graph._repr_html_()
    assert "0 of 2" in pruner._repr_html_()
    record = pruner.step([])
    assert "100.0 %" not in pruner._repr_html_()
    group, (before, after) = next(iter(record.widths.items()))
    for word in (group, str(before), str(after)):
        assert word in record._repr_html_()
    for shown in (pruner._repr_html_(), record._repr_html_(), pruner.costs._repr_html_()):
        assert "nan" not in shown
        assert "-1" not in shown


def test_reports_show_themselves() -> None:
    repair = RepairReport(
        (RepairedLayer("conv.weight", 0.25, 0.0625, 1e-3, 36, 64),), False, (0.4, 0.1), True, 0.2
    )
    shown = repair._repr_html_()
    for word in ("conv.weight", "0.25", "0.0625", "36", "64", "0.4 → 0.1"):
        assert word in shown
    model = pruner_of_a_small_network().model
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[:3] = 0
    report = shrink(model, torch.randn(2, 3, 8, 8))
    shown = report._repr_html_()
    name, (before, after) = next(iter(report.widths.items()))
    assert (before, after) == (16, 13)
    for word in (name, "3 dead channels", f">{before}<", f">{after}<"):
        assert word in shown


def test_a_plot_shows_costs_and_widths() -> None:
    pruner = pruner_of_a_small_network()
    pruner.step([])
    with mpl.rc_context({"backend": "agg"}):
        costs, widths = pruner.plot()
    line = costs.get_lines()[0]
    assert list(line.get_xdata()) == [0, 1]
    assert line.get_ydata()[1] == pytest.approx(
        100 * pruner.costs.current("macs") / pruner.costs.baseline("macs")
    )
    present = [group.width for group in pruner.graph.prunable[::-1]]
    assert [bar.get_width() for bar in widths.containers[1]] == present
    again = pruner.plot([costs, widths])
    assert again == [costs, widths]


def test_the_notebook_is_stored_without_results() -> None:
    for cell in NOTEBOOK["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def run_cell(source: str, names: dict[str, Any]) -> object:
    """Run a cell; the value of an expression at its end is what a notebook would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = []
    with mpl.rc_context({"backend": "agg"}):
        for cell in NOTEBOOK["cells"]:
            if cell["cell_type"] == "code":
                value = run_cell("".join(cell["source"]), names)
                shown += [value._repr_html_()] if hasattr(value, "_repr_html_") else []
    pruner = names["pruner"]
    assert pruner.done
    assert pruner.costs.current("macs") <= 0.5 * pruner.costs.baseline("macs")
    assert len(shown) == 4
    assert names["accuracy"]() > names["accuracy_before"] - 0.1 > 0.5
    assert (tmp_path / "pruned.pth.tar").is_file()
