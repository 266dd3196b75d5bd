"""Tables of the report on budgets, and on rewrites group by group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from image_classification.plain_data import Plain
from pruning.costs.budget import DEFAULT_SHARE
from pruning.report.lineage import Lineage, Stage
from pruning.report.trajectory import Trajectory


def budget_table(lineage: Lineage) -> list[Plain]:
    """Compare requested and reached budgets.

    Returns:
        Rows of `metric` and the shares of the original cost that were `asked` for and `reached`, over all stages that
            pruned.
    """
    records = [record for stage in lineage.stages for record in stage.rewrites]
    pruning = [stage for stage in lineage.stages if stage.rewrites]
    if not records:
        return []
    asked: dict[str, float] = {}
    for stage in pruning:
        if stage.config.get("prune_rate"):
            continue  # its rates determine the channels; no cost was requested
        share = stage.config.get("one_shot_pruning")
        words = stage.config.get("budget") or [f"macs={DEFAULT_SHARE if share is None else 1 - share}"]
        for word in words:
            metric, _, amount = str(word).partition("=")
            asked[metric] = asked.get(metric, 1.0) * float(amount)
    rows = []
    for metric, wanted in asked.items():
        reached = 1.0
        for stage in pruning:
            found = [record["costs"][metric] for record in stage.rewrites if metric in record["costs"]]
            reached *= found[-1][1] / found[-1][2] if found else 1.0
        rows.append({"metric": metric, "asked": wanted, "reached": reached})
    return rows


def criteria_of(lineage: Lineage) -> str | None:
    """Return what chose the channels in the stages that removed some; None if there are none."""
    names = [
        "learned gates"
        if stage.config.get("pruning_method") == "learned"
        else str(stage.config.get("pruning_criterion", "a criterion that the run does not name"))
        for stage in lineage.stages
        if stage.rewrites
    ]
    return ", then ".join(dict.fromkeys(names)) or None


def epochs_until(lineage: Lineage, stage: Stage | None) -> int | None:
    """Return a network's epochs of training by the end of a stage, over all stages; None if a stage does not record
    them.
    """
    if stage is None:
        return None
    stages = lineage.stages[: lineage.stages.index(stage) + 1]
    epochs = [each.progress.get("epoch") for each in stages]
    return None if None in epochs or stages[0].start is not None else sum(each or 0 for each in epochs)


def rewrite_rows(lineage: Lineage, course: Trajectory) -> list[Plain]:
    """Return the records of all stages, with the iteration on the common axis."""
    rows: list[Plain] = []
    for stage, (_, offset, _) in zip(lineage.stages, course.stages, strict=True):
        for record in stage.rewrites:
            kept = {key: record[key] for key in ("widths", "costs", "loss", "scores", "seconds")}
            rows.append({"number": len(rows) + 1, "iteration": offset + max(record["iteration"], 0), **kept})
    return rows


def width_table(rewrites: Sequence[Plain]) -> tuple[list[str], np.ndarray]:
    """Return the groups that lost channels, in order of first loss, and their shares (groups, rewrites) after each
    rewrite.
    """
    groups = list(dict.fromkeys(name for record in rewrites for name in record["widths"]))
    shares = np.ones((len(groups), len(rewrites)))
    for row, group in enumerate(groups):
        first: float | None = None
        share = 1.0
        for column, record in enumerate(rewrites):
            if group in record["widths"]:
                before, after = record["widths"][group]
                first = before if first is None else first
                share = after / first
            shares[row, column] = share
    return groups, shares


def score_table(rewrites: Sequence[Plain], course: Trajectory) -> tuple[list[str], np.ndarray]:
    """Return all scored groups and their median scores (groups, rewrites)."""
    groups = list(course.scores)
    column = {record["iteration"]: number for number, record in enumerate(rewrites)}
    values = np.full((len(groups), len(rewrites)), np.nan)
    for row, group in enumerate(groups):
        for iteration, score in course.scores[group]:
            if iteration in column:
                values[row, column[int(iteration)]] = score
    return groups, values
