"""Tables of `peers.py`: means over the seeds, and how long every method takes to the same accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.measure import mean_and_deviation, with_deviation
from common.report import print_table

_CASE = ("arch", "budget", "epochs_trained", "lr")
_NOT_PEERS = ("ours", "not pruned")
_FIGURES = ("macs", "top1_before", "top1_after_cut", "top1", "method_seconds", "seconds")

Row = dict[str, Any]


def runs_folder(workspace: Path, arch: str, epochs: float, lr: float) -> Path:
    """Return the folder of the runs of one network, length and peak rate."""
    return workspace / f"{arch.replace('/', '_')}-{epochs:g}-{lr:g}"


def run_name(row: Row) -> tuple[Any, ...]:
    """Return what tells a run from all others; without the last item, from those with other seeds."""
    return tuple(row[key] for key in ("method", *_CASE, "seed"))


def summary(rows: list[Row]) -> list[Row]:
    """Return mean and deviation over the seeds, for every network, budget, length and method."""
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(run_name(row)[:-1], []).append(row)
    return [
        dict(zip(("method", *_CASE), kind, strict=True))
        | {"bf16": runs[0].get("bf16", False), "n": len(runs)}
        | {key: mean_and_deviation([run[key] for run in runs if run[key] is not None]) for key in _FIGURES}
        | {"explanations": mean_explanations(runs)}
        for kind, runs in kinds.items()
    ]


def mean_explanations(runs: list[Row]) -> dict[str, dict[str, float | None]]:
    """Return the figures of `drift` over the runs that have them."""
    measured = [run["explanations"] for run in runs if "explanations" in run]
    names = list(measured[0]) if measured else []
    return {name: mean_and_deviation([one[name] for one in measured]) for name in names}


def waits(rows: list[Row], runs: list[Row]) -> list[Row]:
    """Return how long every method takes to the accuracy that the best peer ends with.

    A run counts as there after the first epoch since its last cut whose top-1 reaches the mean final top-1 of the best
    method that is not ours; `reached` is the share of the runs that get there, `seconds` the mean of their times.
    """
    found = []
    for row in rows:
        same = [other for other in rows if all(other[key] == row[key] for key in _CASE)]
        peers = [other["top1"]["mean"] for other in same if not other["method"].startswith(_NOT_PEERS)]
        if not peers:
            continue
        level = max(peers)
        times = [
            time_to(level, run)
            for run in runs
            if "last_cut" in run and all(run[key] == row[key] for key in ("method", *_CASE))
        ]
        if times:
            there = [time for time in times if time is not None]
            case = {key: row[key] for key in ("method", *_CASE)}
            reached = {"level": level, "n": len(times), "reached": len(there) / len(times)}
            found.append(case | reached | {"seconds": mean_and_deviation(there)})
    return found


def time_to(level: float, run: Row) -> float | None:
    """Return the seconds until a run's small network has this top-1; None if it never has."""
    epochs = zip(run["epoch_seconds"], run["top1_epochs"], strict=True)
    after = [at for number, (at, top) in enumerate(epochs, 1) if number >= run["last_cut"] and top >= level]
    return after[0] if after else None


def print_rows(rows: list[Row]) -> None:
    """Print one line per network, budget, length and method."""
    columns = ["method", "budget", "epochs", "n", "MACs", "top-1 after the cut", "top-1 %", "its s", "all s"]
    cells = [
        [
            *_head(row),
            with_deviation(row["macs"], 3),
            *(with_deviation(row[key]) for key in ("top1_after_cut", "top1")),
            *(with_deviation(row[key], 0) for key in ("method_seconds", "seconds")),
            *(
                with_deviation(row["explanations"][key], 2) if key in row["explanations"] else "–"
                for key in ("gradcam_correlation", "lrp_correlation")
            ),
        ]
        for row in rows
    ]
    print_table([*columns, "Grad-CAM ρ", "LRP ρ"], cells)


def print_waits(waited: list[Row]) -> None:
    """Print the table of `waits`."""
    cells = [
        [*_head(row), f"{row['level']:.1f}", f"{row['reached']:.0%}", with_deviation(row["seconds"], 0)]
        for row in waited
    ]
    print_table(["method", "budget", "epochs", "n", "top-1 to reach", "reached", "after s"], cells)


def _head(row: Row) -> list[str]:
    return [row["method"], f"{row['budget']:g}", f"{row['epochs_trained']:g}", str(row["n"])]
