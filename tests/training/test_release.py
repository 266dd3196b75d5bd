"""Before a rewrite nothing is left of the wrappers: neither DDP's hooks nor a compiled graph."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.commands import ROOT
from support.training import build_trainer

from image_classification.callbacks import Callback, TrainLoop
from image_classification.precision import PrecisionConfig

SCRIPT = """
import functools, gc, json, sys, weakref
from pathlib import Path
import torch
import torch.distributed as dist
from image_classification.joining import DistributedConfig, setup_distributed
from image_classification.precision import Precision, PrecisionConfig
from pruning.training.scored import PruningCallback
from pruning.training.pruning_config import PruningConfig
from support.training import MemoryLoader, Recorder, build_trainer, toy_data

folder = Path(sys.argv[1])
torch.set_num_threads(1)
torch.compile = functools.partial(torch.compile, backend="eager")
with setup_distributed(DistributedConfig(device="cpu", dist_timeout=60)) as d:
    config = PruningConfig(
        iterative_pruning=True, pruning_step=2, pruning_delta=0.2, budget=["macs=0.6"], calibration_batches=2,
        pruning_criterion="magnitude", pruning_search="uniform",
    )
    images, targets = toy_data(16)
    recorder = Recorder()
    pruning = PruningCallback(config, MemoryLoader(images, targets, 4, False, d.rank, d.world_size), image_size=8)
    trainer = build_trainer(
        workspace=folder, distributed=d, callbacks=(pruning, recorder), batch_size=4, epochs=1, training_only=True
    )
    trainer.precision.config = PrecisionConfig(compile=True, compile_mode="default")
    trainer.rebind()
    trainer.print_freq = 1
    broadcasts = []
    trainer.fit()
    seen = {
        "losses": recorder.losses,
        "rewrites": len(pruning.pruner.history),
        "statistics_sent": trainer._wrapped.will_sync_module_buffers(),
    }
    trainer.release()
    seen["alike"] = [v.double().sum().item() for v in trainer.state.model.buffers()]
    keep = trainer._wrapped = torch.nn.parallel.DistributedDataParallel(trainer.state.model)
    trainer._forward = trainer._eval_forward = trainer.state.model
    try:
        trainer.release()
    except AssertionError as error:
        seen["kept"] = str(error)
(folder / f"{d.rank}.json").write_text(json.dumps(seen))
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_compiled_wrappers_are_gone_before_a_rewrite(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")
    assert first == second
    assert first["rewrites"] >= 1
    assert len(first["losses"]) == 6
    assert "something still refers to ['DistributedDataParallel']" in first["kept"]


def test_a_network_that_is_soon_cut_again_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewrites after steps 2, 4 and 5 of 12; the last network is compiled when it has trained three steps."""
    compiled: list[int] = []

    def compile_it(model: torch.nn.Module, **options: object) -> torch.nn.Module:
        compiled.append(trainer.state.iteration)
        return model

    class Rewrites(Callback):
        def on_step_end(self, loop: TrainLoop) -> None:
            if loop.state.iteration in (2, 4, 5):
                loop.release()
                loop.rebind()

    monkeypatch.setattr(torch, "compile", compile_it)
    trainer = build_trainer(workspace=tmp_path, callbacks=(Rewrites(),), epochs=1, training_only=True)
    trainer.precision.config = PrecisionConfig(compile=True, compile_after=3)
    trainer.rebind()
    trainer.fit()
    assert trainer.state.iteration == 12
    assert compiled == [8]
    trainer.precision.config = PrecisionConfig(compile=True)
    trainer.rebind()
    assert compiled == [8, 12], "at once where nothing else is said"
