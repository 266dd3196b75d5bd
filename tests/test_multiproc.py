"""The launcher: rank logs, exit codes, forwarded signals, restarts, several nodes."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import multiproc
from image_classification.exit_codes import EXIT_PEER, EXIT_SAVED
from image_classification.launcher import describe_exit

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import os, signal, sys, time
mode, rank = sys.argv[1], int(os.environ["RANK"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def save(signum, frame):
    time.sleep(rank)                                   # rank 1 takes longer than rank 0
    print("saved on", signal.Signals(signum).name, flush=True)
    sys.exit(75)
if mode == "save":
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, save)
threads = os.environ["OMP_NUM_THREADS"]
print("out", rank, "of", os.environ["WORLD_SIZE"], "omp", threads, sys.argv[2:], flush=True)
print("err", rank, file=sys.stderr, flush=True)
if mode == "die" and rank == 1:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "deaf" and rank == 0:                       # hangs in a collective: the handler never runs
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "deaf" and rank == 1:
    sys.exit(3)
if mode == "flaky" and rank == 1 and attempt == 0:
    sys.exit(4)
if mode == "lose" and rank == 0:                       # notices at once that rank 1 is ending
    print("rank 1 has gone", flush=True)
    sys.exit(69)
if mode == "lose" and rank == 1:
    time.sleep(1)
    sys.exit(3)
if mode == "hang" and rank == 0:
    time.sleep(1)
    sys.exit(69)
if mode == "hang":
    os.kill(os.getpid(), signal.SIGSTOP)
if mode == "first" and rank == 0:
    print("what rank 0 has to say", flush=True)
    sys.exit(5)
if mode in ("save", "die", "deaf"):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "rank.py"
    path.write_text(SCRIPT)
    return path


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "multiproc.py"), *map(str, arguments)]
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | environment
    # A shell's background job ignores SIGINT, and so does what it starts, until the launcher has its handlers.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def wait_for(paths: list[Path], text: str) -> None:
    end = time.monotonic() + 60
    while not all(path.exists() and text in path.read_text() for path in paths):
        assert time.monotonic() < end, f"no {text!r} in {paths}"
        time.sleep(0.05)


@pytest.mark.multiprocess
def test_each_rank_has_a_log_and_only_rank_0_is_on_screen(script, tmp_path):
    logs = tmp_path / "logs"
    code, out, err = finish(start("--nproc_per_node", 2, "--log_dir", logs, script, "ok", "--lr", "1e-3"))
    assert code == 0, err
    assert "out 0 of 2" in out
    assert "err 0" in out
    assert "out 1" not in out + err
    text = (logs / "rank_1.log").read_text()
    assert "out 1 of 2" in text
    assert "['--lr', '1e-3']" in text
    assert "err 1" in text  # both streams, one file
    cores = len(os.sched_getaffinity(0))
    assert f"omp {max(1, cores // 2)} " in text
    assert sorted(path.name for path in logs.iterdir()) == ["rank_0.log", "rank_1.log"]


@pytest.mark.multiprocess
def test_terminal_belongs_to_rank_0(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "from image_classification.observe.log import LogConfig, Logger\n"
        "rank = os.environ['RANK']\nprint('terminal', rank, sys.stdout.isatty(), flush=True)\n"
        "with Logger(LogConfig(raport_file=''), Path(), is_main=rank == '0') as logger:\n"
        "    logger.message('a message')\n"
    )
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "multiproc.py",
        "--nproc_per_node",
        "2",
        "--log-dir",
        str(tmp_path),
        str(script),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, cwd=ROOT, env=environment)
    os.close(slave)
    assert process.wait(timeout=90) == 0
    screen = os.read(master, 100_000).decode()
    os.close(master)
    assert "terminal 0 True" in screen
    assert "terminal 1" not in screen
    assert "terminal 1 False" in (tmp_path / "rank_1.log").read_text()
    assert (tmp_path / "rank_0.log").read_text() == "a message\n"


@pytest.mark.multiprocess
def test_killed_rank_stops_the_job_with_its_reason(script, tmp_path):
    begin = time.monotonic()
    code, _, err = finish(
        start("--nproc-per-node", 2, "--log-dir", tmp_path, script, "die", OMP_NUM_THREADS="1")
    )
    assert time.monotonic() - begin < 30
    assert code == 128 + signal.SIGKILL
    assert "rank 1 on" in err
    assert "SIGKILL" in err
    assert str(tmp_path / "rank_1.log") in err
    assert "out 1 of 2 omp 1" in err  # the end of its log


@pytest.mark.multiprocess
@pytest.mark.slow
def test_rank_that_hangs_after_a_peer_failed_is_killed_in_time(script, tmp_path):
    begin = time.monotonic()
    code, _, err = finish(start("--nproc-per-node", 2, "--log-dir", tmp_path, script, "deaf"))
    assert code == 3
    assert "rank 1 on" in err
    assert "ended with exit code 3" in err
    assert time.monotonic() - begin < 30


@pytest.mark.multiprocess
@pytest.mark.parametrize(("mode", "rank", "code"), [("lose", 1, 3), ("first", 0, 5)])
def test_the_reason_comes_last_and_is_of_the_rank_that_failed_first(script, tmp_path, mode, rank, code):
    command = [
        sys.executable,
        "multiproc.py",
        "--nproc-per-node",
        "2",
        "--log-dir",
        str(tmp_path),
        str(script),
        mode,
    ]
    job = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, timeout=90
    )
    assert job.returncode == code
    lines = job.stdout.splitlines()
    assert (
        lines[-1] == f"multiproc: rank {rank} on {os.uname().nodename} ended with exit code {code}; stopping"
    )
    said = "rank 1 has gone" if mode == "lose" else "what rank 0 has to say"
    assert lines.count(said) == 1, "rank 0 is on the screen, its log need not be shown again"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_rank_that_hangs_is_named(script, tmp_path):
    code, _, err = finish(start("--nproc-per-node", 2, "--log-dir", tmp_path, script, "hang"))
    assert code == EXIT_PEER
    assert "rank 1 on" in err.splitlines()[-1]
    assert "hangs" in err.splitlines()[-1]
    assert "rank 0 on" not in err


def processes_of(script: Path) -> list[str]:
    """Command lines of running ranks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if str(script).encode() in words and not words[1].endswith(b"multiproc.py"):
                found.append(words)
    return found


@pytest.mark.multiprocess
def test_ranks_end_with_their_launcher(script, tmp_path):
    process = start("--nproc-per-node", 2, "--log-dir", tmp_path, script, "save")
    wait_for([tmp_path / "rank_0.log", tmp_path / "rank_1.log"], "ready")
    assert len(processes_of(script)) == 2
    process.kill()
    process.communicate(timeout=30)
    end = time.monotonic() + 10
    while processes_of(script):
        assert time.monotonic() < end, "ranks outlive their launcher"
        time.sleep(0.05)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code", "delays"),
    [(signal.SIGTERM, EXIT_SAVED, (0.3, 3.0, 7.0)), (signal.SIGINT, 130, (1.5,))],
)
def test_signals_of_the_first_seconds_have_the_same_codes_and_leave_no_rank(tmp_path, signum, code, delays):
    """While the launcher imports, while its ranks do, and when the first one trains, or nearly so."""
    flags = [
        "shapes:train=64,val=12",
        "--arch",
        "resnet20",
        "--device",
        "cpu",
        "--epochs",
        "50",
        "--data-backend",
        "pytorch",
    ]
    flags += ["--batch-size", "4", "--workers", "1"]
    jobs = []
    for number, delay in enumerate(delays):
        folder = tmp_path / str(number)
        words = ["--nproc-per-node", 2, "--log-dir", folder, "main.py", *flags, "--workspace", folder]
        process = start(*words, OMP_NUM_THREADS="1", LUCIDPRUNE_CACHE=str(tmp_path / "cache"))
        time.sleep(delay)
        process.send_signal(signum)
        jobs.append((delay, process))
    for delay, process in jobs:
        got, out, err = finish(process)
        assert got == code, (delay, out, err)
        assert "Traceback" not in err, (delay, err)
    assert not any(processes_of(tmp_path / str(number)) for number in range(len(jobs)))


@pytest.mark.multiprocess
def test_restart_goes_on_and_keeps_the_log_of_what_failed(script, tmp_path):
    code, _, err = finish(
        start("--nproc-per-node", 2, "--max-restarts", 1, "--log-dir", tmp_path, script, "flaky")
    )
    assert code == 0
    assert "ended with exit code 4; starting all ranks again (restart 1 of 1)" in err
    assert (tmp_path / "rank_1.1.log").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGUSR1,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_signal_reaches_every_rank_and_saved_ends_without_restart(script, tmp_path, signum):
    process = start("--nproc-per-node", 2, "--max-restarts", 3, "--log-dir", tmp_path, script, "save")
    logs = [tmp_path / "rank_0.log", tmp_path / "rank_1.log"]
    wait_for(logs, "ready")
    process.send_signal(signum)
    code, _, err = finish(process)
    assert code == EXIT_SAVED
    assert all(f"saved on {signum.name}" in log.read_text() for log in logs)
    assert "asks to be started again" in err
    assert not (tmp_path / "rank_0.1.log").exists()


@pytest.mark.multiprocess
def test_ranks_that_ignore_the_signal_are_stopped_after_the_timeout(tmp_path):
    script = tmp_path / "ignore.py"
    script.write_text(
        "import signal, time\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)\nprint('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = start("--shutdown-timeout", 1, "--log-dir", tmp_path / "logs", script)
    wait_for([tmp_path / "logs" / "rank_0.log"], "ready")
    begin = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGUSR1
    assert "ranks still ran 1 s after SIGUSR1" in err
    assert time.monotonic() - begin < 20


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "rendezvous"), [("ok", "c10d"), ("die", "static"), ("die", "c10d"), ("save", "static")]
)
def test_two_nodes_meet_and_stop_together(script, tmp_path, mode, rendezvous):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    meeting: list[object] = ["--master_addr", "127.0.0.1", "--master_port", port]
    if rendezvous == "c10d":
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "job"]
    nodes = [
        start(
            "--nnodes",
            2,
            "--node_rank",
            rank,
            *meeting,
            "--nproc_per_node",
            1,
            "--log-dir",
            tmp_path,
            script,
            mode,
        )
        for rank in range(2)
    ]
    if mode == "save":
        wait_for([tmp_path / "rank_0.log", tmp_path / "rank_1.log"], "ready")
        for node in nodes:
            node.send_signal(signal.SIGUSR1)
    results = [finish(node) for node in nodes]
    expected = {"ok": 0, "die": 128 + signal.SIGKILL, "save": EXIT_SAVED}[mode]
    assert [code for code, _, _ in results] == [expected, expected], results
    assert sum("out 0 of 2" in out for _, out, _ in results) == 1
    if mode == "die":  # the healthy node says which rank it was, too
        assert all("rank 1 on" in err for _, _, err in results)


@pytest.mark.parametrize("flag", [["--tee", "3"], ["-r", "3"], ["--local-ranks-filter", "0"]])
def test_flags_that_could_not_apply_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        multiproc.parse([*flag, "main.py"])
    assert "does not apply" in capsys.readouterr().err


def test_log_dir_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert multiproc.main(["--log-dir", str(tmp_path / "file" / "logs"), "main.py"]) == 2
    assert "--log-dir" in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.slow
def test_nodes_that_do_not_meet(tmp_path):
    arguments = ["--nnodes", 2, "--node_rank", 1, "--master_port", 1, "--rdzv-conf", "timeout=2"]
    code, _, err = finish(start(*arguments, "--log-dir", tmp_path, "main.py"))
    assert code == 1
    assert "the 2 nodes did not meet" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("value", ["0", "many", "-2"])
def test_number_of_processes_is_checked(value, capsys):
    with pytest.raises(SystemExit):
        multiproc.parse(["--nproc_per_node", value, "main.py"])
    assert "--nproc-per-node" in capsys.readouterr().err


def test_one_node_needs_no_address_and_many_get_the_static_one():
    one = multiproc.parse(["--nproc_per_node", "2", "main.py", "--epochs", "3"])
    assert (one.rdzv_backend, one.rdzv_endpoint) == ("c10d", "localhost:0")
    assert one.training_script_args == ["--epochs", "3"]
    many = multiproc.parse(["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "main.py"])
    assert (many.rdzv_backend, many.master_addr, many.master_port, many.node_rank) == (
        "static",
        "10.0.0.1",
        29500,
        1,
    )


def test_exit_codes_in_words():
    assert describe_exit(1) == "ended with exit code 1"
    assert re.search(r"signal 9 \(SIGKILL.*memory", describe_exit(-9))
    assert "signal 15 (SIGTERM)" in describe_exit(-15)
    assert "asks to be started again" in describe_exit(EXIT_SAVED)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_command_is_launched_without_a_script(tmp_path: Path) -> None:
    """As in a wheel's environment, which has no `main.py`: the program beside this Python is found by its name."""
    words = ["launch", "--nproc_per_node", "2", "lucidprune", "groups", "resnet20"]
    code = "import sys; from pruning.__main__ import lucidprune; sys.exit(lucidprune(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "layer3" in done.stdout


def test_a_script_stays_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python3").write_text("", encoding="utf-8")
    words = ["--nproc_per_node", "1"]
    assert not multiproc.parse([*words, "python3"]).no_python
    assert not multiproc.parse([*words, "no_such_program.py"]).no_python
    assert multiproc.parse([*words, "env"]).no_python
