"""Proof that a refactoring changed nothing: the same short jobs with the code of two commits, compared bit for bit.

    python benchmarks/same_training.py BASE [HEAD] [--job NAME …] [--json FILE] [--keep DIR] [--cross]

BASE and HEAD are git revisions; HEAD is by default WORKTREE, a snapshot of the current working tree (tracked files and
new ones that git does not ignore). Both are put into temporary folders, and every job of `same/jobs.py` runs there on
the CPU, in separate processes with one thread and fixed seeds, one job after the other. The files that a job leaves are
compared by `same/comparing.py`:

    *raport*.json           every figure of every logging step
    *.pth.tar, *.pth        every tensor and plain value: weights, averages, optimizer, structure, random states, …
    *.json, *.npy           every value written by verbs

A few keys, such as times and flags, are ignored; IGNORED there lists them all. Floating-point numbers are equal if
their bits are. The code under test is not imported here. Some jobs stop half-way and are resumed; they must end like
the job that was not stopped ("as whole" in the table).

--job    runs these jobs alone, and those whose files they need --keep   keeps the files in DIR by commit, and does not
run a job again that ended there as it is now defined; files of
         WORKTREE are kept too, to look at, but never taken for results
--cross  runs every job that needs files of others a third time, by HEAD on files of BASE: checkpoints of BASE are
         resumed, evaluated, loaded, explained, and teach. It must end as BASE ended on its own

A table is printed: job, logging steps, tensors and numbers compared, seconds of both sides, the first difference. The
exit code is 0 if all is equal, 1 if anything differs or fails, 2 for a revision that does not exist, 130 when stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.same.comparing import Comparison, compare_folders
from benchmarks.same.jobs import JOBS, Job

SCRIPTS = Path(__file__).resolve().parent / "same"
WORKTREE = "WORKTREE"
OUTCOME = ".outcome.json"
LOG = "log.txt"
STOPPED = 75
STEP_SECONDS = 600.0
SHOWN = 5


# ------------------------------------------------------------------------------------------------ running


class JobError(Exception):
    """A job did not end as it should."""


def run_process(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], stop_after: int | None
) -> int:
    """Run this interpreter in a folder, appending its output to the log there, and return the exit code.

    Args:
        words: Arguments of `python`.
        folder: Working directory.
        environment: All environment variables.
        stop_after: Send SIGUSR1 when the report has this many lines of figures.
    """
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        if stop_after is not None:
            while process.poll() is None and count_lines(folder) < stop_after:
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)
        return process.wait(STEP_SECONDS)
    except subprocess.TimeoutExpired:
        raise JobError(f"took longer than {STEP_SECONDS:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks that it may have left running
        process.wait()


def count_lines(folder: Path) -> int:
    """Return the number of lines of figures in the report of a running job."""
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*raport*.json")]
    return sum(
        line.count('"type": "LOG"') - line.count('"PARAMETER"')
        for text in texts
        for line in text.splitlines()
    )


def run_step(step: str, folder: Path, environment: Mapping[str, str], places: Mapping[str, str]) -> None:
    """Run a step of a job.

    Raises:
        JobError: The step failed; the message is the last line that it printed.
    """
    kind, *words = shlex.split(string.Template(step).substitute(places))
    if kind == "copy":
        skipped = shutil.ignore_patterns(OUTCOME, LOG)
        shutil.copytree(folder / words[0], folder, dirs_exist_ok=True, ignore=skipped)
        return
    stop_after = int(words.pop(0)) if kind == "stop" else None
    code = run_process(words, folder, environment, stop_after)
    expected = 0 if stop_after is None else STOPPED
    if code != expected:
        said = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise JobError(f"ended with {code}, not {expected}: {said[-1] if said else 'said nothing'}")


@dataclasses.dataclass
class Side:
    """One commit's files.

    Attributes:
        commit: Its hash, or WORKTREE.
        folder: Folder of its jobs, each in a folder of its own.
        reused: Whether jobs that already finished there need not run again.
        tree: Returns the root of its code, checking it out on first use.
    """

    commit: str
    folder: Path
    reused: bool
    tree: Callable[[], Path]

    def environment(self) -> dict[str, str]:
        """Environment of its processes. Each commit generates the data set again, since the drawing may have
        changed.
        """
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        places = {"PYTHONPATH": str(self.tree()), "LUCIDPRUNE_CACHE": str(self.folder / ".cache")}
        return {**os.environ, **single, **places, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}

    def check_imports(self) -> None:
        """Check that its processes use its code, not an installed package.

        Raises:
            JobError: They use other code.
        """
        code = "import importlib.util as u; print(u.find_spec('pruning').origin)"
        words = [sys.executable, "-c", code]
        found = subprocess.run(words, env=self.environment(), cwd=self.folder, capture_output=True, text=True)
        if not found.stdout.startswith(f"{self.tree()}{os.sep}"):
            raise JobError(f"pruning is imported from {found.stdout or found.stderr}, not from {self.tree()}")


def fingerprint(job: Job, jobs: Mapping[str, Job]) -> str:
    """Return a fingerprint that changes with the job, the jobs it needs, or the interpreter's packages."""
    needs = [fingerprint(jobs[name], jobs) for name in job.needs]
    own = any("$here" in step for step in job.steps)
    scripts = [(SCRIPTS / "own_loop.py").read_text(encoding="utf-8")] if own else []
    content = [job.steps, needs, scripts, sys.version, torch.__version__, np.__version__]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def run_job(job: Job, side: Side, folder: Path) -> float:
    """Run a job in a new folder and return its seconds.

    Raises:
        JobError: The job failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    places = {"tree": str(side.tree()), "here": str(SCRIPTS)}
    begin = time.monotonic()
    for step in job.steps:
        run_step(step, folder, side.environment(), places)
    return time.monotonic() - begin


def run_or_reuse(job: Job, side: Side, jobs: Mapping[str, Job]) -> float:
    """Run a job of a side unless it has already run, and return its seconds.

    Raises:
        JobError: The job failed.
    """
    folder, mark = side.folder / job.name, fingerprint(job, jobs)
    file = folder / OUTCOME
    if side.reused and file.is_file():
        outcome = json.loads(file.read_text(encoding="utf-8"))
        if outcome["fingerprint"] == mark:
            return float(outcome["seconds"])
    seconds = run_job(job, side, folder)
    file.write_text(json.dumps({"fingerprint": mark, "seconds": seconds}), encoding="utf-8")
    return seconds


def run_across(job: Job, base: Side, head: Side, folder: Path) -> float:
    """Run a job with HEAD on the files it needs from BASE, in `folder`, and return its seconds.

    Raises:
        JobError: The job failed.
    """
    folder.mkdir(parents=True)
    for name in job.needs:
        (folder / name).symlink_to(base.folder / name, target_is_directory=True)
    return run_job(job, head, folder / job.name)


# ------------------------------------------------------------------------------------------------ revisions


def git(*words: str) -> str:
    """Run git in this repository and return its output.

    Raises:
        SystemExit: git failed; with its message and code 2.
    """
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        print(f"git {' '.join(words)}: {done.stderr.strip()}", file=sys.stderr)
        raise SystemExit(2)
    return done.stdout.strip()


def copy_worktree(target: Path) -> None:
    """Copy the working tree: tracked files in their current state, and new ones that are not ignored."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in dict.fromkeys(filter(None, names)):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def remove_worktree(target: Path) -> None:
    """Undo `git worktree add`, even if it was interrupted."""
    shutil.rmtree(target, ignore_errors=True)
    git("worktree", "prune")


def open_side(
    name: str, commit: str, folder: Path, trees: Path, stack: contextlib.ExitStack, *, reused: bool
) -> Side:
    """Create a side whose code is checked out on demand, and removed with the stack."""
    folder.mkdir(parents=True, exist_ok=True)

    @functools.cache
    def tree() -> Path:
        target = trees / name
        if commit == WORKTREE:
            copy_worktree(target)
        else:
            stack.callback(remove_worktree, target)
            git("worktree", "add", "--detach", str(target), commit)
        return target

    side = Side(commit, folder, reused, tree)
    if commit == WORKTREE:
        tree()  # the current state, not that after BASE has run
    return side


# ------------------------------------------------------------------------------------------------ the whole


@dataclasses.dataclass
class Row:
    """A line of the table: what was compared, and the seconds of both sides."""

    job: str
    kind: str
    seconds: tuple[float, float]
    comparison: Comparison

    def describe(self) -> str:
        """Format the line."""
        found = self.comparison
        base, head = (f"{seconds:6.1f}" if seconds else "     –" for seconds in self.seconds)
        verdict = "equal"
        if found.differences:
            more = f" (and {len(found.differences) - 1} more)" if len(found.differences) > 1 else ""
            verdict = f"{found.differences[0]}{more}"
        return (
            f"{self.job:<22} {self.kind:<8} {found.steps:>5} {found.tensors:>7} {found.numbers:>8} {base} {head}  "
            f"{verdict}"
        )

    def plain(self) -> dict[str, Any]:
        """Return the line as plain data, with only the first differences."""
        found = self.comparison
        return {
            "job": self.job,
            "kind": self.kind,
            "seconds": list(self.seconds),
            "steps": found.steps,
            "tensors": found.tensors,
            "numbers": found.numbers,
            "num_differences": len(found.differences),
            "differences": found.differences[:SHOWN],
        }


def chosen(names: Sequence[str]) -> list[Job]:
    """Return the named jobs (all, if none is named) and those that they need, in the order of the table."""
    jobs = {job.name: job for job in JOBS}
    wanted = set(names or jobs)
    for job in reversed(JOBS):
        if job.name in wanted:
            wanted |= {*job.needs, *filter(None, [job.same_as])}
    return [job for job in JOBS if job.name in wanted]


def attempt(run: Callable[[], float], what: str, job: Job, failed: dict[str, str]) -> float:
    """Run, unless something that the job needs has failed; record a failure, return seconds (0 for none)."""
    broken = [name for name in job.needs if name in failed]
    if broken:
        failed[job.name] = f"not run by {what}: {broken[0]} failed"
        return 0.0
    print(f"{what} {job.name} …", file=sys.stderr, flush=True)
    try:
        return run()
    except JobError as error:
        failed[job.name] = f"by {what}: {error}"
        return 0.0


def rows_of(jobs: Sequence[Job], base: Side, head: Side) -> Iterator[Row]:
    """Run jobs on both sides, and compare."""
    by_name = {job.name: job for job in JOBS}
    failed: dict[str, dict[str, str]] = {"BASE": {}, "HEAD": {}}
    for job in jobs:
        seconds = [
            attempt(functools.partial(run_or_reuse, job, side, by_name), what, job, failed[what])
            for what, side in (("BASE", base), ("HEAD", head))
        ]
        errors = [failed[what][job.name] for what in failed if job.name in failed[what]]
        pair = (seconds[0], seconds[1])
        if errors:
            yield Row(job.name, "", pair, Comparison(differences=errors))
            continue
        if job.compared:
            yield Row(job.name, "", pair, compare_folders(base.folder / job.name, head.folder / job.name))
        if job.same_as is not None and job.same_as not in failed["HEAD"]:
            folders = (head.folder / job.same_as, head.folder / job.name)
            yield Row(job.name, "as whole", (0.0, pair[1]), compare_folders(*folders))


def rows_across(jobs: Sequence[Job], base: Side, head: Side, folder: Path) -> Iterator[Row]:
    """Run jobs with HEAD on the files of BASE, and compare with BASE's own results."""
    for job in jobs:
        done = all((base.folder / name / OUTCOME).is_file() for name in (job.name, *job.needs))
        if not (job.needs and job.compared and done):
            continue
        failed: dict[str, str] = {}
        place = folder / job.name
        seconds = attempt(functools.partial(run_across, job, base, head, place), "HEAD on BASE", job, failed)
        comparison = Comparison(differences=list(failed.values()))
        if not failed:
            comparison = compare_folders(base.folder / job.name, place / job.name)
        yield Row(job.name, "cross", (0.0, seconds), comparison)


def describe_run(
    arguments: argparse.Namespace, base: Side, head: Side, rows: Sequence[Row]
) -> dict[str, Any]:
    """Return everything as plain data, with the environment."""
    return {
        "base": {"revision": arguments.base, "commit": base.commit},
        "head": {"revision": arguments.head, "commit": head.commit, "worktree_of": git("rev-parse", "HEAD")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": 1,
        "machine": platform.machine(),
        "equal": not any(row.comparison.differences for row in rows),
        "rows": [row.plain() for row in rows],
    }


def run(arguments: argparse.Namespace) -> int:
    """Run everything, print the table and return the exit code."""
    jobs = chosen(arguments.job)
    base_commit, head_commit = (
        WORKTREE if revision == WORKTREE else git("rev-parse", "--verify", f"{revision}^{{commit}}")
        for revision in (arguments.base, arguments.head)
    )
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-training-"))).resolve()
        kept = arguments.keep.resolve() if arguments.keep is not None else temporary / "results"
        repeated = head_commit == base_commit  # comparing a commit with itself: it has to run twice
        folders = (kept / base_commit, kept / f"{head_commit}-again" if repeated else kept / head_commit)
        base = open_side("base", base_commit, folders[0], temporary, stack, reused=base_commit != WORKTREE)
        reused = head_commit != WORKTREE and not repeated
        head = open_side("head", head_commit, folders[1], temporary, stack, reused=reused)
        for side in (base, head):
            if not side.reused:
                shutil.rmtree(side.folder)
                side.folder.mkdir()
                side.check_imports()
        print(
            f"{'job':<31} {'steps':>5} {'tensors':>7} {'numbers':>8} {'BASE s':>6} {'HEAD s':>6}", flush=True
        )
        results = rows_of(jobs, base, head)
        across = rows_across(jobs, base, head, temporary / "cross") if arguments.cross else iter(())
        for found in (results, across):
            for row in found:
                print(row.describe(), flush=True)
                rows.append(row)
        plain = describe_run(arguments, base, head, rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    unequal = sum(bool(row.comparison.differences) for row in rows)
    print("all equal" if not unequal else f"{unequal} of {len(rows)} comparisons differ")
    return int(unequal > 0)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", metavar="BASE", help="revision that is taken for right")
    parser.add_argument(
        "head", metavar="HEAD", nargs="?", default=WORKTREE, help="revision to compare with it"
    )
    names = [job.name for job in JOBS]
    parser.add_argument(
        "--job",
        nargs="+",
        default=[],
        choices=names,
        metavar="NAME",
        help=f"these jobs only, and those that they need: {', '.join(names)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep what jobs write, and reuse it by commit"
    )
    parser.add_argument("--cross", action="store_true", help="also run HEAD on the files of BASE")
    return parser.parse_args(argv)


def stop(number: int, frame: FrameType | None) -> None:
    """Make SIGTERM end the program like Ctrl-C, with everything removed."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the tool and return its exit code."""
    signal.signal(signal.SIGTERM, stop)
    try:
        return run(parse())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
