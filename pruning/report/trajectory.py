"""The history of a lineage: figures over iterations, all stages on one axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from image_classification.plain_data import Plain
from pruning.report.lineage import Stage

#: Headline figures of a classifier, in order of preference: multi-label data has mAP, others top-1.
HEADLINES = ("top1", "map", "map_images")


@dataclasses.dataclass
class Trajectory:
    """The history as points (iteration over all stages, value).

    Attributes:
        headline: one of `HEADLINES`; in percent.
        validation, training: The headline, after epochs and (top-1 only) within them.
        costs: Metric → points (iteration, share of the original); two points per rewrite, before and after it. A second
            pruning stage's shares are multiplied by the first one's.
        losses: (iteration, calibration loss before, after) of each rewrite.
        scores: Group → points (iteration, median score).
        stages: (kind, first iteration, last iteration).
    """

    headline: str = "top1"
    validation: list[list[float]] = dataclasses.field(default_factory=list)
    training: list[list[float]] = dataclasses.field(default_factory=list)
    costs: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    scores: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    stages: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)


def trajectory_of(stages: Sequence[Stage]) -> Trajectory:
    """Concatenate the stages' figures."""
    course = Trajectory()
    offset = 0
    entries = [entry for stage in stages for entry in figures(stage)]
    logged = {key for entry in entries for key in entry.get("data", {})}
    course.headline = next((name for name in ("map", "map_images") if f"val.{name}" in logged), "top1")
    for stage in stages:
        length = stage.progress.get("iteration", 0)
        steps = stage.progress.get("steps_per_epoch", 0)
        course.stages.append((stage.kind, offset, offset + length))
        if steps:
            _add_figures(course, stage, steps, offset)
        _add_rewrites(course, stage, offset, length)
        offset += length
    return course


def figures(stage: Stage) -> list[Plain]:
    """Return the lines of a stage's report that hold figures."""
    return [
        entry for entry in stage.entries if entry.get("type") == "LOG" and isinstance(entry.get("step"), list)
    ]


def _add_figures(course: Trajectory, stage: Stage, steps: int, offset: int) -> None:
    """Add figures by iteration; if a resumed run wrote an iteration twice, the later line counts."""
    validation, training = dict[int, float](), dict[int, float]()
    scores: dict[str, dict[int, float]] = {}
    for entry in figures(stage):
        step, data = entry["step"], entry["data"]
        found = judged(data).get(course.headline)
        if len(step) == 1 and found is not None:
            validation[offset + (step[0] + 1) * steps] = found
        if len(step) == 2:
            iteration = offset + step[0] * steps + step[1]
            if data.get(f"train.{course.headline}") is not None:
                training[iteration + 1] = data[f"train.{course.headline}"]
            for key, value in data.items():
                if key.startswith("score.") and value is not None:
                    scores.setdefault(key.removeprefix("score."), {})[iteration] = value
    course.validation += _points(validation)
    course.training += _points(training)
    for group, values in scores.items():
        course.scores.setdefault(group, []).extend(_points(values))


def _add_rewrites(course: Trajectory, stage: Stage, offset: int, length: int) -> None:
    start = {metric: points[-1][1] for metric, points in course.costs.items()}
    for record in stage.rewrites:
        iteration = offset + max(record["iteration"], 0)
        losses = record["loss"]  # before the cut, after it and, if there was one, after the repair
        before, after = losses[0], losses[-1]
        course.losses.append([iteration, before, after])
        for metric, (was, now, base) in record["costs"].items():
            points = course.costs.setdefault(metric, [[0, 1.0]])
            share = start.get(metric, 1.0)
            points += [[iteration, share * was / base], [iteration, share * now / base]]
    for points in course.costs.values():
        points.append([offset + length, points[-1][1]])


def _points(values: Mapping[int, float]) -> list[list[float]]:
    return [[iteration, values[iteration]] for iteration in sorted(values)]


def last_accuracy(stage: Stage) -> dict[str, float] | None:
    """Return the last validation that a stage logged: `loss` and figures in percent; None without one."""
    for entry in reversed(figures(stage)):
        data = judged(entry["data"])
        found = {
            name: data[name] for name in (*HEADLINES, "top5", "f1", "loss") if data.get(name) is not None
        }
        if any(name in found for name in HEADLINES):
            return found
    return None


def judged(data: Plain) -> Plain:
    """Return a validation's figures without their prefix; those of the averaged weights if there are any."""
    prefix = "val_ema." if any(key.startswith("val_ema.") for key in data) else "val."
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}
