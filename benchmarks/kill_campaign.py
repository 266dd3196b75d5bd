"""Jobs killed with SIGKILL at random moments and restarted: they must end like an undisturbed one, bit for bit.

    python benchmarks/kill_campaign.py [--job NAME …] [--kills N] [--seed S] [--output FILE] [--go-on] [--keep DIR]

The jobs are those of `same/jobs.py` that train. Each runs once undisturbed; then the same command, with `--resume auto`
and a checkpoint every second iteration, is started again and again, and its whole process group is killed after a
random time of up to the undisturbed run's length, so that start-up, steps, rewrites, saves and validations are all hit.
The results of a run that finished after its kills are compared: every tensor and plain value of `checkpoint.pth.tar`
and `model_best.pth.tar`.

A table is printed: job, seconds undisturbed, kills, finished runs, differences. The exit code is 0 if nothing differs,
1 if anything does or a job fails. The JSON file is written after every finished run, and with `--go-on` the kills in it
count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common.report import BenchmarkParser, write_json
from same.comparing import Comparison, read_file
from same.jobs import JOBS

#: The nine kinds of job that train.
KINDS = (
    *("plain", "pruned", "unstructured", "predictor", "selector", "casm", "saliency", "learned", "distilled"),
)
COMPARED = ("checkpoint.pth.tar", "model_best.pth.tar")
RESUMED = "--resume auto --checkpoint-interval 2"
_MOST_KILLS = 4  # per run, so that it finishes eventually
_BY_NAME = {job.name: job for job in JOBS}


@dataclasses.dataclass
class Outcome:
    """Result of a job's part of the campaign.

    Attributes:
        job: Its name.
        seconds: Length of the undisturbed run.
        kills: Number of processes killed.
        completed: Number of runs that finished.
        differences: One sentence each.
    """

    job: str
    seconds: float
    kills: int = 0
    completed: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)


def start(job: str, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a job's training in its folder, in its own process group."""
    folder.mkdir(parents=True, exist_ok=True)
    (step,) = _BY_NAME[job].steps
    words = shlex.split(f"{step} {RESUMED}".replace("$tree", str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *words[1:]],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def run_whole(job: str, folder: Path) -> float:
    """Run a job undisturbed, after the jobs it needs, and return its own seconds."""
    for needed in _BY_NAME[job].needs:
        if not (folder / needed).exists():
            run_whole(needed, folder)
    begin = time.monotonic()
    code = start(job, folder / job, folder / f"{job}.log").wait()
    if code != 0:
        raise RuntimeError(f"{job} ended with {code}: see {folder / job}.log")
    return time.monotonic() - begin


def run_killed(outcome: Outcome, kills: int, folder: Path, chooser: random.Random) -> None:
    """Kill a job at most four times, let it finish, and compare its results.

    Args:
        outcome: Result of the job so far, with the length of its undisturbed run; this run is added.
        kills: Total number of kills of the job.
        folder: Folder of the campaign, with the results of the undisturbed run.
        chooser: Random generator of the moments.
    """
    killed = folder / f"{outcome.job}-killed-{outcome.completed}"
    mine, begin = 0, time.monotonic()
    while True:
        process = start(outcome.job, killed, folder / f"{killed.name}.log")
        may_be_killed = mine < _MOST_KILLS and outcome.kills < kills
        try:
            code = process.wait(chooser.uniform(0, outcome.seconds) if may_be_killed else None)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            mine += 1
            outcome.kills += 1
    outcome.completed += 1
    if mine == 0:  # the machine was busier when it was measured: no moment should come after the end
        outcome.seconds = min(outcome.seconds, time.monotonic() - begin)
    if code != 0:
        outcome.differences.append(f"{killed.name} ended with {code}: see its log")
    else:
        outcome.differences += [
            f"{killed.name}: {text}" for text in differences(folder / outcome.job, killed)
        ]


def differences(whole: Path, killed: Path) -> list[str]:
    """Compare the checkpoints of two runs, which may be in subfolders of the runs' folders (CASM's)."""
    comparison = Comparison()
    names = [str(path.relative_to(whole)) for name in COMPARED for path in sorted(whole.rglob(name))]
    if not names:
        return ["the undisturbed run left no checkpoint"]
    for name in names:
        if not (killed / name).is_file():
            comparison.differences.append(f"{name} is missing")
        else:
            comparison.compare(name, read_file(whole / name), read_file(killed / name))
    left = [path.name for path in killed.rglob(".*") if path.suffix == ".tmp" or path.name.endswith(".lock")]
    return comparison.differences + [f"{name} was left behind" for name in left]


def known_outcomes(path: Path) -> dict[str, Outcome]:
    """Return the outcomes of an earlier campaign, by job; none if there was none."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {row["job"]: Outcome(**row) for row in content["jobs"]}


def campaign(
    jobs: Sequence[str],
    kills: int,
    seed: int,
    folder: Path,
    known: dict[str, Outcome],
    save: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Run the whole campaign; a line is printed for every job.

    Args:
        jobs: Their names.
        kills: Total number of kills per job, including known ones.
        seed: Seed of the moments.
        folder: Folder for workspaces and logs.
        known: Outcomes to continue from, by job; they are updated.
        save: Called with all outcomes after every finished run.
    """
    print(f"{'job':<14}{'seconds':>9}{'kills':>7}{'completed':>11}{'differences':>13}", flush=True)
    for job in jobs:
        outcome = known.setdefault(job, Outcome(job, 0.0))
        if outcome.kills < kills:
            outcome.seconds = run_whole(job, folder)
        while outcome.kills < kills:
            run_killed(outcome, kills, folder, random.Random(f"{seed} {job} {outcome.kills}"))
            save(list(known.values()))
        print(
            f"{job:<14}{outcome.seconds:>9.1f}{outcome.kills:>7}{outcome.completed:>11}{len(outcome.differences):>13}",
            flush=True,
        )
        for text in outcome.differences:
            print(f"  {text}", flush=True)
    return list(known.values())


def main() -> int:
    """Run the campaign from the command line."""
    parser = BenchmarkParser(__doc__, cpu_only=True)
    parser.add_argument(
        "--job", action="append", choices=KINDS, help="this job alone; may be given several times"
    )
    parser.add_argument("--kills", type=int, default=23, help="of each job; default: %(default)s, 207 in all")
    parser.add_argument("--go-on", action="store_true", help="count the kills that are in the JSON file")
    parser.add_argument("--keep", type=Path, help="keep workspaces and logs in this folder")
    arguments = parser.parse("kill_campaign.json", {"job": ["plain"], "kills": 1})
    if arguments.kills < 1:
        parser.error(f"--kills {arguments.kills}: at least 1 is needed")

    def save(outcomes: list[Outcome]) -> None:
        rows = [dataclasses.asdict(outcome) for outcome in outcomes]
        write_json(arguments, sum(outcome.kills for outcome in outcomes), {"jobs": rows})

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        known = known_outcomes(arguments.output) if arguments.go_on else {}
        outcomes = campaign(arguments.job or KINDS, arguments.kills, arguments.seed, folder, known, save)
    return int(any(outcome.differences for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
