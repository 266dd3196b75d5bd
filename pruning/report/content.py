"""The report's content as plain data: collected from a run's files, or measured if they lack it.

Data that is neither in the files nor measurable is listed under `missing` with the reason; nothing is made up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from explainers.attribution.record import UnsupportedOperatorError
from image_classification.config import check
from image_classification.models import arch_info, identity_of, input_of
from image_classification.observe.environment import describe_environment
from image_classification.plain_data import Plain
from image_classification.small_files import read_json
from pruning.report.lineage import Lineage, Stage, find_lineage
from pruning.report.measure import EvaluationImages, accuracy_of, answers_of, explain, open_images
from pruning.report.networks import (
    Network,
    cost_rows,
    costs_of,
    layer_widths,
    load_network,
    same_architecture,
    unpruned,
)
from pruning.report.rewrite_tables import budget_table, criteria_of, epochs_until, rewrite_rows
from pruning.report.speed import compare_speed
from pruning.report.trajectory import Trajectory, last_accuracy, trajectory_of
from pruning.report.wording import counted

#: Written by `python -m pruning sensitivity --output` to a run's or a stage's folder.
SENSITIVITY_FILE = "sensitivity.json"
PARTS = ("accuracy", "explanations", "speed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the measurements.

    Attributes:
        original: Network to compare with; None for the one that pruning started from.
        data: Replaces the run's data.
        skip: Those of `PARTS` that are not measured.
        methods: Attribution methods.
        num_images: Number of images on which explanations are compared.
        batch_sizes, num_batches: Batch sizes and number of batches of the speed measurement.
        device: Device to compute on.
    """

    original: Path | None = None
    data: str | None = None
    skip: Sequence[str] = ()
    methods: Sequence[str] = ("gradcam",)
    num_images: int = 200
    batch_sizes: Sequence[int] = (1, 32)
    num_batches: int = 30
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))


@dataclasses.dataclass
class Content:
    """The content shown by `page.render`.

    Attributes:
        plain: JSON-able data.
        course: Figures over iterations.
        gallery: Images as data URIs, omitted from the JSON.
    """

    plain: Plain
    course: Trajectory
    gallery: list[Plain]


def collect(run: Path, settings: Settings) -> Content:
    """Read a run and measure what is missing.

    Args:
        run: Workspace of a run, or a folder of workspaces that continue each other.
        settings: What to measure.

    Raises:
        FileNotFoundError, ConfigError: The run does not exist or has no checkpoint.
    """
    lineage = find_lineage(run)
    final = lineage.last
    check(
        final.checkpoint is not None,
        f"RUN {final.workspace} holds no checkpoint: it has not finished an epoch, or ran with --no-checkpoints",
    )
    assert final.checkpoint is not None
    missing: list[str] = []
    pruned = load_network("pruned", final.checkpoint)
    original = _original(lineage, pruned, settings, missing)
    course = trajectory_of(lineage.stages)
    if not any(stage.entries for stage in lineage.stages):
        missing.append("course of training: the run wrote no report (--raport-file '')")
    plain: Plain = {
        "run": str(run),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": [_stage(stage) for stage in lineage.stages],
        "budget": budget_table(lineage),
        "widths": [],
        "trajectory": dataclasses.asdict(course),
        "rewrites": rewrite_rows(lineage, course),
        "criterion": criteria_of(lineage),
        "environment": describe_environment(settings.device),
        "config": final.config,
    }
    images = _images(final, settings, pruned, missing)
    size = _image_size(final, images, pruned)
    plain["network"] = str(final.checkpoint)
    plain["num_validation"] = None if images is None else len(images.dataset.val)
    plain["costs"] = _costs(original, pruned, size)
    plain["image_size"] = size
    if original is not None:
        plain["widths"] = layer_widths(original.model, pruned.model)
    plain["accuracy"] = _accuracy(lineage, original, images, settings, missing)
    plain["predictions"] = _predictions(original, pruned, images, settings)
    gallery = _explanations(plain, original, pruned, images, settings, missing)
    plain["speed"] = _speed(original, pruned, size, final, settings, missing)
    folders = [run, *(stage.workspace for stage in reversed(lineage.stages))]
    plain["sensitivity"] = read_sensitivity(folders, missing)
    plain["missing"] = missing
    return Content(plain, course, gallery)


def read_sensitivity(folders: Iterable[Path], missing: list[str]) -> Plain | None:
    """Read the results of `python -m pruning sensitivity`, if its file is among the run's files.

    Args:
        folders: Folders to look in; the first match is used.
        missing: Receives the reason if the file cannot be read.
    """
    files = [folder / SENSITIVITY_FILE for folder in folders if (folder / SENSITIVITY_FILE).is_file()]
    if not files:
        return None
    path = files[0]
    try:
        content: Plain = read_json(path, "sensitivity of the groups:")
        if all(len(row["losses"]) == len(content["removed"]) for row in content["groups"]):
            return {key: content[key] for key in ("groups", "removed", "repair", "num_images")}
    except (ValueError, TypeError, KeyError):
        pass
    missing.append(f"sensitivity of the groups: {path} was not written by `python -m pruning sensitivity`")
    return None


def _original(lineage: Lineage, pruned: Network, settings: Settings, missing: list[str]) -> Network | None:
    path = settings.original or lineage.original_weights()
    if path is not None:
        network = load_network("original", path, lineage.last.config.get("arch"))
        check(
            same_architecture(network.model, pruned.model),
            f"--original {path} is another architecture than {pruned.weights}: give the network that was pruned",
        )
        return network
    first = lineage.first_pruning()
    if first is None:
        missing.append("rewrites: no stage of this run removed channels, so there is nothing to compare")
    elif lineage.stages[first].start is None:
        missing.append(
            "accuracy and explanations before pruning: this run pruned while it trained from scratch, so an unpruned "
            "trained network never existed; --original FILE compares with one that was trained separately"
        )
    else:
        missing.append(
            f"accuracy and explanations before pruning: {lineage.stages[first].start}, which pruning started from, is "
            "not there any more; --original FILE says where it is"
        )
    fresh = unpruned(pruned)
    if fresh is None:
        missing.append("widths before pruning: the checkpoint does not name its architecture")
    return fresh


def _stage(stage: Stage) -> Plain:
    started = [line["time"] for line in stage.invocations]
    return {
        "kind": stage.kind,
        "workspace": str(stage.workspace),
        "epochs": stage.progress.get("epoch"),
        "iterations": stage.progress.get("iteration"),
        "num_rewrites": len(stage.rewrites),
        "start": stage.start,
        "accuracy": last_accuracy(stage),
        "seconds": _seconds(stage),
        "started": started,
        "commands": list(dict.fromkeys(line["command"] for line in stage.invocations)),
        "environment": stage.invocations[-1]["environment"] if stage.invocations else None,
        "num_processes": stage.invocations[-1]["num_processes"] if stage.invocations else None,
    }


def _seconds(stage: Stage) -> float | None:
    """Return the seconds of training without validation, as logged per epoch."""
    seconds = dict[int, float]()
    for entry in stage.entries:
        if entry.get("type") == "LOG" and "train.epoch_seconds" in entry.get("data", {}):
            seconds[entry["step"][0]] = entry["data"]["train.epoch_seconds"]
    return sum(seconds.values()) if seconds else None


def _images(final: Stage, settings: Settings, pruned: Network, missing: list[str]) -> EvaluationImages | None:
    if final.config.get("data_backend") in ("synthetic", "syntetic") and settings.data is None:
        missing.append("explanations: the run had synthetic data; --data DATA gives real images")
        return None
    try:
        return open_images(final.config, settings.device, settings.data, input_of(pruned.model))
    except (OSError, ValueError) as error:
        if settings.data is not None:  # requested explicitly; the run's own data may be gone
            raise
        missing.append(f"explanations, and accuracy that was not logged: the data cannot be opened ({error})")
        return None


def _image_size(final: Stage, images: EvaluationImages | None, pruned: Network) -> int:
    if images is not None:
        return images.preset.image_size
    identity = identity_of(pruned.model)
    arch = final.config.get("arch") or (identity.arch if identity is not None else "")
    return final.config.get("image_size") or arch_info(arch).image_size


def _costs(original: Network | None, pruned: Network, size: int) -> list[Plain]:
    after = costs_of(pruned.model, size)
    before = None if original is None else costs_of(original.model, size)
    return [
        {
            "metric": metric,
            "name": name,
            "unit": unit,
            "divisor": divisor,
            "before": None if before is None else before[metric],
            "after": after[metric],
        }
        for metric, (name, unit, divisor) in cost_rows().items()
    ]


def _accuracy(
    lineage: Lineage,
    original: Network | None,
    images: EvaluationImages | None,
    settings: Settings,
    missing: list[str],
) -> list[Plain]:
    """Return figures before pruning, after it and after fine-tuning, from the logs or measured now."""
    first = lineage.first_pruning()
    wanted: list[tuple[str, Stage | None, Path | None]] = []
    for index, stage in enumerate(lineage.stages):
        if first is not None and index == first - 1 and settings.original is None:
            wanted.append(("before pruning", stage, lineage.original_weights()))
        elif first is None or index >= first:
            name = {"pruning": "after pruning", "fine-tuning": "after fine-tuning"}.get(
                stage.kind, "at the end"
            )
            wanted.append((name, stage, stage.checkpoint))
    if (
        original is not None
        and original.weights is not None
        and (not wanted or wanted[0][0] != "before pruning")
    ):
        wanted.insert(0, ("before pruning", None, original.weights))
    rows = []
    for name, origin, path in wanted:
        logged = _logged(origin, path, lineage.last)
        epochs = epochs_until(lineage, origin)
        if logged is not None:
            rows.append({"when": name, "epochs": epochs, "source": "logged by the run", **logged})
        elif path is not None and images is not None and "accuracy" not in settings.skip:
            network = load_network(name, path, lineage.last.config.get("arch"))
            figures = accuracy_of(network, images)
            rows.append({"when": name, "epochs": epochs, "source": "measured for this report", **figures})
        else:
            missing.append(f"accuracy {name}: it was not logged and was not measured")
    if len(rows) > 1 and rows[0]["when"] == "before pruning":
        missing.append(_no_control(rows[0]["epochs"], rows[-1]["epochs"]))
    return rows


def _no_control(before: object, after: object) -> str:
    """Explain that without a control the accuracies do not show what the unpruned network would have learned
    meanwhile.
    """
    trained = "longer"
    if isinstance(before, int) and isinstance(after, int):
        trained = f"{counted(after - before, 'epoch')} longer"
    return (
        f"what pruning costs: the last network was trained {trained} than the one before pruning, and no unpruned one "
        "was trained as long; --original FILE compares with such a network"
    )


def _logged(stage: Stage | None, path: Path | None, final: Stage) -> dict[str, float] | None:
    """Return the accuracy of a stage's last checkpoint, if its run logged it on the data of the last stage."""
    if (
        stage is None
        or path is None
        or stage.checkpoint is None
        or path.resolve() != stage.checkpoint.resolve()
    ):
        return None
    same = all(stage.config.get(key) == final.config.get(key) for key in ("data", "image_size", "resize"))
    return last_accuracy(stage) if same else None


def _predictions(
    original: Network | None, pruned: Network, images: EvaluationImages | None, settings: Settings
) -> Plain | None:
    """Compare the two networks' predictions, if both are trained and images have one class each."""
    asked = "accuracy" not in settings.skip
    if not asked or images is None or original is None or original.weights is None:
        return None
    return None if images.dataset.multi_label else answers_of(original, pruned, images, settings.num_images)


def _explanations(
    plain: Plain,
    original: Network | None,
    pruned: Network,
    images: EvaluationImages | None,
    settings: Settings,
    missing: list[str],
) -> list[Plain]:
    plain["explanations"] = None
    if "explanations" in settings.skip:
        missing.append("explanations: left out as asked (--skip explanations)")
        return []
    if original is None or original.weights is None or images is None:
        return []
    try:
        found = explain(original, pruned, images, methods=settings.methods, num_images=settings.num_images)
    except UnsupportedOperatorError as error:
        missing.append(f"explanations: {error}; --method chooses another")
        return []
    gallery: list[Plain] = found.pop("gallery")
    if "localization" not in found:
        missing.append("point accuracy and AUC: the data has neither masks nor boxes")
    plain["explanations"] = found
    return gallery


def _speed(
    original: Network | None, pruned: Network, size: int, final: Stage, settings: Settings, missing: list[str]
) -> list[Plain]:
    if "speed" in settings.skip:
        missing.append("speed: left out as asked (--skip speed)")
        return []
    return compare_speed(
        [network for network in (original, pruned) if network is not None],
        size,
        settings.device,
        batch_sizes=settings.batch_sizes,
        num_batches=settings.num_batches,
        memory_format=final.config.get("memory_format", "nchw"),
    )
