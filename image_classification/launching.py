"""Start one training process per GPU, on one node or many.

    lucidprune launch --nproc_per_node 8 lucidprune train ARGS…
    python ./multiproc.py --nproc_per_node 8 ./main.py ARGS…

`torch.distributed.run` does the work: its flags (with `_` or `-`), rendezvous and elastic agent. Differences:

- SIGTERM, SIGINT and SIGUSR1 go only to the ranks, not to their data workers, once a rank handles them, and the ranks
  have `--shutdown-timeout` seconds to save and exit. A second SIGINT stops them at once.
- Ranks end with their launcher, however it ends.
- A rank that exits with EXIT_SAVED (75: "saved, start me again") ends the job with that code and no restart.
- A dead rank stops every node within seconds, or restarts them (`--max-restarts`); the launcher says which
  rank, why, and how its log ends.
- One log file per rank, `rank_3.log` in `--log-dir`, never overwritten; only rank 0 is on the screen.
- OMP_NUM_THREADS, if unset, shares the CPU cores among the processes.
- A command instead of a script, such as `lucidprune`, is run directly: `--no-python` is not needed.
- Exit code: 0, EXIT_SAVED, the code of the rank that failed first, or 128 + the signal that killed it; EXIT_PEER (69)
  if a rank hung. A signal before there are ranks ends in EXIT_SAVED, SIGINT in 130.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import uuid
from pathlib import Path

from torch.distributed import DistNetworkError
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters, registry
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import (
    config_from_args,
    determine_local_world_size,
    get_args_parser,
    parse_min_max_nnodes,
)

from image_classification.exit_codes import STOP_SIGNALS, code_of_stop
from image_classification.launcher import Agent, RankLogs, start_words

# torchrun's flags for signals, screen and log files, which the agent handles itself, and one that runs no command.
NOT_APPLICABLE = (
    *("redirects", "tee", "local_ranks_filter", "log_line_prefix_template", "logs_specs", "run_path"),
    *("signals_to_handle", "duplicate_stdout_filters", "duplicate_stderr_filters"),
)


def parse(argv: list[str] | None, prog: str = "multiproc.py") -> argparse.Namespace:
    """Parse torchrun's command line with LucidPrune's defaults: a single node needs no rendezvous flags."""
    parser = argparse.ArgumentParser(
        prog,
        parents=[get_args_parser()],
        add_help=False,
        conflict_handler="resolve",  # newer torch also has --shutdown-timeout, with another default
    )
    parser.add_argument(
        "--shutdown-timeout",
        "--shutdown_timeout",
        type=int,
        default=120,
        metavar="SECONDS",
        help="Time that the ranks have to save and leave after a signal (default: 120).",
    )
    parser.set_defaults(
        master_port=None
    )  # older torch has the default 29500, indistinguishable from a given port
    args = parser.parse_args(argv)
    for name in NOT_APPLICABLE:
        if getattr(args, name, None) != parser.get_default(name):  # None: this torch version has no such flag
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} does not apply: each rank writes its own file in --log-dir; remove {flag}")
    try:
        args.nproc_per_node = str(determine_local_world_size(args.nproc_per_node))
        one_node = parse_min_max_nnodes(args.nnodes)[1] == 1
    except (ValueError, RuntimeError) as error:
        parser.error(f"--nproc-per-node {args.nproc_per_node} on --nnodes {args.nnodes}: {error}")
    if int(args.nproc_per_node) < 1:
        parser.error(f"--nproc-per-node {args.nproc_per_node}: at least 1 process is needed")
    if args.standalone or (one_node and args.rdzv_backend == "static" and args.master_port is None):
        args.rdzv_backend = "c10d"
        args.rdzv_endpoint = "localhost:0"
        args.rdzv_id = uuid.uuid4().hex
    args.master_port = args.master_port or 29500
    command = _command(args)
    if command is not None:
        args.no_python = True
        args.training_script = command
    return args


def _command(args: argparse.Namespace) -> str | None:
    """Return the program named instead of a script, next to this Python or on the PATH; None for a script."""
    script: str = args.training_script
    if args.module or args.no_python or Path(script).is_file():
        return None
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which(script, path=os.pathsep.join(places))


def make_spec(config: LaunchConfig, command: str, command_args: list[str]) -> WorkerSpec:
    """Build the agent's specification: the command of a rank, the number of ranks, and the rendezvous."""
    rendezvous = RendezvousParameters(
        config.rdzv_backend,
        config.rdzv_endpoint,
        config.run_id,
        config.min_nodes,
        config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    static = rendezvous.backend == "static"
    address, _, port = rendezvous.endpoint.rpartition(":")
    entrypoint, words = start_words(command, command_args)
    return WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=words,
        rdzv_handler=registry.get_rendezvous_handler(rendezvous),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=address if static else None,
        master_port=int(port) if static else None,
        local_addr=config.local_addr,
        event_log_handler=config.event_log_handler,
        numa_options=config.numa_options,
        virtual_local_rank=config.virtual_local_rank,
    )


def launch(args: argparse.Namespace, logs: RankLogs) -> int:
    """Run the job to its end and return its exit code."""
    num_cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // int(args.nproc_per_node))))
    config, command, command_args = config_from_args(args)
    # The agent explains a failure itself; torch would add "failed (exitcode: 75)" for a rank that saved.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    if config.max_restarts > 0:
        # Ranks that share the agents' store find the ranks' addresses from before the restart in it
        # (pytorch/pytorch#135712); with this variable, rank 0 opens a new store for every attempt.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    spec = make_spec(config, str(command), command_args)
    agent = Agent(spec, logs, args.shutdown_timeout)
    agent.take_signals()
    try:
        result = agent.run()
    except SignalException as error:
        print(f"multiproc: stopped by {signal.Signals(error.sigval).name}: {error}", file=sys.stderr)
        return code_of_stop(error.sigval) if error.sigval in STOP_SIGNALS else 128 + error.sigval
    finally:
        logs.close()
        spec.rdzv_handler.shutdown()
    return agent.reason[0] if result is not None and result.is_failed() else 0


def main(argv: list[str] | None = None) -> int:
    """Launch the script named in `argv`, wait for it, and return the job's exit code."""
    return run(parse(argv))


def run(args: argparse.Namespace) -> int:
    """Like `main`, for a parsed command line."""
    try:
        logs = RankLogs(args.log_dir)
    except OSError as error:
        print(f"multiproc: --log-dir {args.log_dir} cannot be made: {error.strerror}", file=sys.stderr)
        return 2
    code = 1
    try:
        code = launch(args, logs)
    except (RendezvousError, DistNetworkError) as error:
        print(f"multiproc: the {args.nnodes} nodes did not meet: {error}", file=sys.stderr)
    if code == 0 or args.log_dir is not None:  # otherwise the ranks' logs are in there
        shutil.rmtree(logs.root_log_dir)
    return code
