"""Nine kinds of job through a full disk, a read-only one, a removed workspace, two at once and a hung rank.

    sudo python benchmarks/disasters.py [--job NAME …] [--disaster NAME …] [--output FILE] [--go-on] [--keep DIR]

The jobs are those of `same/jobs.py` that train, with a checkpoint every second iteration. A job is hit once its first
checkpoint is there:

    full        the workspace is a tmpfs, which a file fills to the last byte
    read-only   the workspace is a tmpfs, which is mounted again read-only; where the job holds a file open for writing,
                so that the system refuses, folder and files are made immutable instead
    removed     the workspace's folder is removed
    twice       the same command is started beside it, which waits for it (SIGSTOP) and then goes on
    hung        of two ranks the second is stopped (SIGSTOP), with `--dist-timeout 15`

Then the cause is removed (space, write access), and the same command is run once more with `--resume auto`. A row is
printed for each: how the job ended (of two at once the second) and its last message, whether the last checkpoint could
be read, and whether the repeated command produced the same results as an undisturbed run, tensor by tensor (for two
ranks: whether it finished).

Mounting needs root. The JSON file is written after every row, and with `--go-on` rows already in it are not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common.report import BenchmarkParser, write_json
from kill_campaign import KINDS, RESUMED, differences, run_whole
from same.jobs import JOBS

from image_classification.models import read_safely

_BY_NAME = {job.name: job for job in JOBS}
_PATIENCE = 600.0  # timeout in seconds for anything that a job should do
_SPACE = "1g"
_BATCH_SIZE = 16  # batch size of the jobs
_CHECKPOINT = "checkpoint.pth.tar"


@dataclasses.dataclass
class Row:
    """Result of a job.

    Attributes:
        job, disaster: Their names.
        code: Exit code; of two at once that of the second.
        said: Its last line of error.
        tracebacks: Number of tracebacks in its output.
        kept: The iteration of the checkpoint left afterwards, "none", or why it cannot be read.
        again: How the same command ended when run again.
        differences: Differences between its results and an undisturbed run's.
        how: What was done instead of what the disaster's name says.
    """

    job: str
    disaster: str
    code: int
    said: str
    tracebacks: int
    kept: str
    again: int
    differences: list[str]
    how: str = ""


# -- jobs --------------------------------------------------------------------------------------------------


def launch(job: str, folder: Path, log: Path, *, ranks: int = 1) -> subprocess.Popen[bytes]:
    """Start a job in `folder`, with the workspace `run` in it, in its own process group."""
    (step,) = _BY_NAME[job].steps
    program, *words = shlex.split(f"{step} {RESUMED}".replace("$tree", str(ROOT)))
    assert program == "python"
    words += ["--casms-path" if "--casms-path" in words else "--workspace", "run"]
    if ranks > 1:
        launcher = [str(ROOT / "multiproc.py"), "--nproc_per_node", str(ranks)]
        # The same number of iterations as one process.
        words = [*launcher, *words, "--dist-timeout", "15", "-b", str(_BATCH_SIZE // ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a job and return its exit code, or −9 if it had to be killed because it did not end."""
    try:
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def checkpoint_of(workspace: Path) -> Path | None:
    """Return the last checkpoint, which may be in a subfolder (CASM's)."""
    return next(iter(sorted(workspace.rglob(_CHECKPOINT))), None)


def wait_for_checkpoint(process: subprocess.Popen[bytes], workspace: Path) -> None:
    """Return as soon as there is a checkpoint."""
    begin = time.monotonic()
    while checkpoint_of(workspace) is None:
        if process.poll() is not None or time.monotonic() - begin > _PATIENCE:
            raise RuntimeError(f"{workspace}: no checkpoint came; see the log beside it")
        time.sleep(0.02)


def kept(workspace: Path) -> str:
    """Return the iteration of the existing checkpoint, "none", or why it cannot be read."""
    path = checkpoint_of(workspace)
    if path is None:
        return "none"
    try:
        return str(read_safely(path)["iteration"])
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"


# -- disasters ---------------------------------------------------------------------------------------------

#: Causes a disaster: (process, workspace) → (function that undoes it, what was done).
Harm = Callable[[subprocess.Popen[bytes], Path], tuple[Callable[[], None], str]]


def fill(process: subprocess.Popen[bytes], workspace: Path) -> tuple[Callable[[], None], str]:
    """Fill the workspace's file system."""
    filler = workspace / "filler"
    with filler.open("wb") as file:
        while (free := os.statvfs(workspace).f_bavail * os.statvfs(workspace).f_frsize) > 0:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free)
    return filler.unlink, ""


def close_for_writing(process: subprocess.Popen[bytes], workspace: Path) -> tuple[Callable[[], None], str]:
    """Mount the workspace's file system read-only, or make its files immutable."""
    begin = time.monotonic()
    while time.monotonic() - begin < 2:
        if subprocess.run(["mount", "-o", "remount,ro", workspace], capture_output=True).returncode == 0:
            return lambda: _must("mount", "-o", "remount,rw", workspace), ""
    _must("chattr", "-R", "+i", workspace)
    return lambda: _must("chattr", "-R", "-i", workspace), "immutable"


def remove(process: subprocess.Popen[bytes], workspace: Path) -> tuple[Callable[[], None], str]:
    """Remove the workspace, including files created meanwhile."""
    while workspace.exists():
        shutil.rmtree(workspace, ignore_errors=True)
    return lambda: None, ""


def stop_a_rank(process: subprocess.Popen[bytes], workspace: Path) -> tuple[Callable[[], None], str]:
    """Stop the second rank for good."""
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [
        int(rank) for rank in ranks if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{rank}/environ").read_bytes()
    ]
    os.kill(second, signal.SIGSTOP)
    return lambda: None, ""


HARMS: dict[str, Harm] = {
    "full": fill,
    "read-only": close_for_writing,
    "removed": remove,
    "hung": stop_a_rank,
}
DISASTERS = ("full", "read-only", "removed", "twice", "hung")


def _must(*words: str | Path) -> None:
    subprocess.run(words, check=True)


@contextlib.contextmanager
def file_system(workspace: Path, *, own: bool) -> Iterator[None]:
    """Create the workspace's folder, as a separate file system or within the surrounding one."""
    if not own:
        yield
        return
    workspace.mkdir(parents=True)
    _must("mount", "-t", "tmpfs", "-o", f"size={_SPACE}", "tmpfs", workspace)
    try:
        yield
    finally:
        _must("umount", "--lazy", workspace)


def hit(job: str, disaster: str, folder: Path, whole: Path) -> Row:
    """Put a job through a disaster.

    Args:
        job, disaster: Their names.
        folder: Folder of the campaign, with the files that the job needs.
        whole: The workspace of an undisturbed run.
    """
    own = folder / f"{job}-{disaster}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    workspace, log, ranks = own / "run", folder / f"{own.name}.log", 2 if disaster == "hung" else 1
    log.unlink(missing_ok=True)
    with file_system(workspace, own=disaster in ("full", "read-only")):
        process = launch(job, own, log, ranks=ranks)
        wait_for_checkpoint(process, workspace)
        if disaster == "twice":
            second = folder / f"{own.name}-second.log"
            second.unlink(missing_ok=True)
            os.killpg(
                process.pid, signal.SIGSTOP
            )  # so that it is still running, however long the second takes to start
            code = ended(launch(job, own, second))
            os.killpg(process.pid, signal.SIGCONT)
            first = ended(process)
            how, undo, log = f"the first ended with {first}", lambda: None, second
        else:
            undo, how = HARMS[disaster](process, workspace)
            code = ended(process)
        said, tracebacks = last_error(log), log.read_text(errors="replace").count("Traceback")
        left = kept(workspace)
        undo()
        again = ended(launch(job, own, folder / f"{own.name}-again.log", ranks=ranks))
        found = differences(whole, workspace) if ranks == 1 else []
    return Row(job, disaster, code, said, tracebacks, left, again, found, how)


def last_error(log: Path) -> str:
    """Return the last line of a log that reports an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines or [""])[-1]


# -- all of it ---------------------------------------------------------------------------------------------


def undisturbed(job: str, folder: Path) -> Path:
    """Return the workspace of an undisturbed run."""
    for needed in _BY_NAME[job].needs:
        if not (folder / needed).exists():
            run_whole(needed, folder)
    own = folder / f"{job}-whole"
    if not own.exists():
        own.mkdir()
        code = ended(launch(job, own, folder / f"{own.name}.log"))
        if code != 0:
            raise RuntimeError(f"{job} ended with {code}: see {own}.log")
    return own / "run"


def main() -> int:
    """Run the campaign; return 1 if a checkpoint was lost or a repeated run ended differently."""
    parser = BenchmarkParser(__doc__, cpu_only=True)
    parser.add_argument("--job", action="append", choices=KINDS, help="this job alone; may be repeated")
    parser.add_argument(
        "--disaster", action="append", choices=DISASTERS, help="this one alone; may be repeated"
    )
    parser.add_argument("--go-on", action="store_true", help="leave out what is in the JSON file")
    parser.add_argument("--keep", type=Path, help="keep workspaces and logs in this folder")
    arguments = parser.parse("disasters.json", {"job": ["plain"], "disaster": ["twice"]})
    rows: list[Row] = []
    if arguments.go_on and arguments.output.exists():
        rows = [Row(**row) for row in json.loads(arguments.output.read_text())["rows"]]
    done = {(row.job, row.disaster) for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for job in arguments.job or KINDS:
            for disaster in arguments.disaster or DISASTERS:
                if (job, disaster) in done:
                    continue
                row = hit(job, disaster, folder, undisturbed(job, folder))
                rows.append(row)
                print(as_line(row), flush=True)
                plain = [dataclasses.asdict(one) for one in rows]
                write_json(arguments, 1, {"rows": plain})
    return int(any(row.again != 0 or row.differences or row.tracebacks for row in rows))


def as_line(row: Row) -> str:
    """Format a row of the table in Markdown."""
    same = "its end" if row.disaster == "hung" else "the same"
    if row.differences:
        same = "differs"
    again = same if row.again == 0 else f"ended with {row.again}"
    how = f" ({row.how})" if row.how else ""
    return f"| {row.job} | {row.disaster}{how} | {row.code} | {row.said} | {row.kept} | {again} |"


if __name__ == "__main__":
    sys.exit(main())
