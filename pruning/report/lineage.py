"""The runs behind a result: pretraining, pruning, fine-tuning – stages, each with its own workspace.

A stage records the weights it started from (`--pretrained-weights`); following them backwards leads to the stages
before it, and finally to the file that everything began with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from image_classification.checkpoint import BEST_FILENAME
from image_classification.checkpoint_format import is_ours
from image_classification.config import check
from image_classification.models import read_safely
from image_classification.observe.json_report import read_report
from image_classification.observe.provenance import read_invocations
from image_classification.plain_data import Plain, PlainMapping
from image_classification.published_name import is_published
from image_classification.yaml_reading import read_yaml_mapping

CONFIG = "config.yaml"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of `main.py`.

    Attributes:
        workspace: Its folder.
        kind: `training`, `pruning` or `fine-tuning`.
        config: The resolved configuration.
        entries: Lines of its report; empty if it wrote none.
        invocations: Commands and environments it was started with.
        checkpoint: Its latest checkpoint, None if there is none.
        progress: `epoch`, `iteration`, `steps_per_epoch` of that checkpoint.
        rewrites: Records of its rewrites (`pruning.rewrites.rewrite_record.RewriteRecord`), oldest first.
    """

    workspace: Path
    kind: str
    config: Plain
    entries: list[Plain]
    invocations: list[Plain]
    checkpoint: Path | None
    progress: dict[str, int]
    rewrites: list[Plain]

    @property
    def start(self) -> str | None:
        """The weights that the stage started from."""
        return self.config.get("pretrained_weights")


@dataclasses.dataclass(frozen=True)
class Lineage:
    """The stages of a result, oldest first."""

    stages: tuple[Stage, ...]

    @property
    def last(self) -> Stage:
        """The reported stage."""
        return self.stages[-1]

    def first_pruning(self) -> int | None:
        """Index of the first stage that rewrote the network."""
        return next((index for index, stage in enumerate(self.stages) if stage.rewrites), None)

    def original_weights(self) -> Path | None:
        """The network before any pruning; None if the first pruning stage started from scratch."""
        index = self.first_pruning()
        start = None if index is None else self.stages[index].start
        if index is None or start is None:
            return None
        return Path(start) if is_published(start) else find_weights(self.stages[index])


def find_lineage(run: Path) -> Lineage:
    """Find the stages that led to a run.

    Args:
        run: A workspace, or a folder of workspaces that continue each other.

    Raises:
        FileNotFoundError: The run does not exist.
        ConfigError: A folder holds several results; the message names them.
    """
    workspace = run if (run / CONFIG).is_file() else _last_of(run)
    stages = [read_stage(workspace)]
    while stages[0].start is not None:
        weights = find_weights(stages[0])
        known = {stage.workspace.resolve() for stage in stages}
        if weights is None or not (weights.parent / CONFIG).is_file() or weights.parent.resolve() in known:
            break
        stages.insert(0, read_stage(weights.parent))
    named = [dataclasses.replace(stage, kind=_kind(stages, index)) for index, stage in enumerate(stages)]
    return Lineage(tuple(named))


def _kind(stages: Sequence[Stage], index: int) -> str:
    if stages[index].rewrites or stages[index].config.get("iterative_pruning"):
        return "pruning"
    return "fine-tuning" if any(stage.rewrites for stage in stages[:index]) else "training"


def _last_of(folder: Path) -> Path:
    """Return the workspace in a folder that no other workspace in it continues."""
    if not folder.is_dir():
        raise FileNotFoundError(f"RUN {folder}: there is no such folder; give the --workspace of a run")
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not inside:
        raise FileNotFoundError(f"RUN {folder}: holds no {CONFIG}; give the --workspace of a run of main.py")
    starts = [find_weights(read_stage(path)) for path in inside]
    continued = {path.parent.resolve() for path in starts if path is not None}
    last = [path for path in inside if path.resolve() not in continued]
    names = ", ".join(str(path) for path in last)
    check(len(last) == 1, f"RUN {folder} holds several results: give one of {names or 'its workspaces'}")
    return last[0]


def read_stage(workspace: Path) -> Stage:
    """Read a workspace. Its kind is set by `find_lineage`, which knows the stages before it."""
    config: Plain = {str(key): value for key, value in read_yaml_mapping(workspace / CONFIG, "RUN").items()}
    check(
        isinstance(config.get("data"), str) and isinstance(config.get("arch"), str),
        f"RUN {workspace}: its {CONFIG} is not that of a run (it names no data, or no arch): give the --workspace of a "
        "run of main.py",
    )
    report = config.get("raport_file")
    entries = read_report(workspace / report) if report and (workspace / report).is_file() else []
    names = (config.get("checkpoint_filename", "checkpoint.pth.tar"), BEST_FILENAME)
    checkpoint = next((workspace / name for name in names if (workspace / name).is_file()), None)
    content = None if checkpoint is None else read_safely(checkpoint)
    check(
        checkpoint is None or is_ours(content),
        f"RUN {workspace}: {checkpoint} is not a checkpoint of a run: restore the run's own file, or delete it",
    )
    payload: Plain = dict(content) if is_ours(content) else {}
    progress: dict[str, int] = {
        key: payload[key] for key in ("epoch", "iteration", "steps_per_epoch") if key in payload
    }
    return Stage(
        workspace,
        "training",
        config,
        entries,
        read_invocations(workspace),
        checkpoint,
        progress,
        rewrites_of(payload.get("callbacks") or {}),
    )


def rewrites_of(callbacks: Plain) -> list[Plain]:
    """Return the records of rewrites in a checkpoint's `callbacks`, from whichever callback, as plain JSON data."""
    records: list[Plain] = []
    for state in callbacks.values():
        if not isinstance(state, Mapping):
            continue
        records += [record for record in state.get("history") or () if {"widths", "costs"} <= set(record)]
        single = state.get("record")
        if isinstance(single, Mapping) and {"widths", "share", "loss"} <= set(single):
            records.append(_of_learned_gates(single))
    return sorted(json.loads(json.dumps(records)), key=lambda record: record["iteration"])


def _of_learned_gates(record: PlainMapping) -> Plain:
    """Convert the record of learned gates: a single rewrite, before training and without scores."""
    return {
        "iteration": 0,
        "widths": record["widths"],
        "costs": {metric: [1.0, share, 1.0] for metric, share in record["share"].items()},
        "loss": record["loss"],
        "scores": {},
        "seconds": {},
    }


def find_weights(stage: Stage) -> Path | None:
    """Return the file that a stage started from; its path is relative to the folder that the run was started in."""
    if stage.start is None:
        return None
    given = Path(stage.start)
    candidates = [given]
    if not given.is_absolute():
        parts = stage.workspace.resolve().parts
        own = Path(stage.config.get("workspace") or "").parts
        if own and parts[-len(own) :] == own:
            candidates.append(Path(*parts[: -len(own)]) / given)
        candidates.append(stage.workspace.parent / given)
    return next((path for path in candidates if path.is_file()), None)
