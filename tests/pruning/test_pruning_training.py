"""Rewrites inside training: what must not change does not, and a killed run ends with the same network."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import MemoryLoader, Recorder, build_trainer, toy_data

from image_classification.callbacks import Callback
from image_classification.models import Structure, build_from_structure, read_safely
from image_classification.observe.console import Console
from image_classification.trainer import Trainer
from pruning.engine.surgery import prune_channels
from pruning.search import Decision, GreedySearch, Situation
from pruning.training.pruning_config import PruningConfig
from pruning.training.scored import PruningCallback

#: What makes `callback` prune once: no intervals.
PRUNED_ONCE: dict[str, Any] = {
    "iterative_pruning": False,
    "one_shot_pruning": 0.4,
    "budget": [],
    "pruning_step": 50,
    "pruning_delta": 5e-3,
}


def callback(**settings: Any) -> PruningCallback:
    config = PruningConfig(
        **{
            "iterative_pruning": True,
            "pruning_step": 3,
            "pruning_delta": 0.1,
            "budget": ["macs=0.7"],
            "calibration_batches": 2,
            **settings,
        }
    )
    images, targets = toy_data(16)
    return PruningCallback(config, MemoryLoader(images, targets, 8, False), image_size=8)


def trained(workspace: Path, *callbacks: Callback, model: Any = None, **settings: Any) -> Trainer:
    trainer = build_trainer(
        workspace=workspace,
        callbacks=callbacks,
        model=model,
        **{"epochs": 2, "ema": 0.9, "dropout": True, **settings},
    )
    trainer.fit()
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.state.ema is not None
    tensors = {f"model.{k}": v for k, v in trainer.state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in trainer.state.ema.module.state_dict().items()}
    for index, entry in trainer.state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return tensors


def assert_identical(first: Trainer, second: Trainer) -> None:
    expected, got = state(first), state(second)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_the_network_shrinks_on_schedule_and_everything_follows(tmp_path: Path) -> None:
    pruning = callback()
    trainer = trained(tmp_path, pruning)
    pruner = pruning.pruner
    assert pruner is not None
    assert [record.iteration for record in pruner.history] == [3, 6, 9]
    assert pruner.done
    assert pruner.costs.current("macs") <= 0.7 * pruner.costs.baseline("macs") * (1 + 1e-6)
    parameters = list(trainer.state.model.parameters())
    known = {id(p) for group in trainer.state.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in parameters} == known
    for parameter in parameters:
        assert trainer.state.optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    averaged = [tuple(p.shape) for p in trainer.state.ema.module.parameters()]
    assert averaged == [tuple(p.shape) for p in parameters]
    record = pruner.history[0]
    assert record.widths
    assert all(after < before for before, after in record.widths.values())
    assert record.loss[0] == record.loss[0]
    assert set(record.seconds) == {"score", "search", "rewrite", "repair"}


def test_with_nothing_due_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """The callback traces, verifies and waits: no random number, statistic or gradient changes."""
    length = {"epochs": 300, "run_epochs": 2}
    plain = trained(tmp_path / "plain", **length)
    attached = trained(tmp_path / "attached", callback(pruning_step=1000), **length)
    assert_identical(plain, attached)


def test_scoring_and_deciding_without_removing_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything of a rewrite is done, and then all channels are kept."""
    choose = GreedySearch.choose

    def choose_and_keep_all(search: GreedySearch, situation: Situation) -> Decision:
        choose(search, situation)
        return Decision({})

    plain, keeper = trained(tmp_path / "plain"), callback()
    monkeypatch.setattr(GreedySearch, "choose", choose_and_keep_all)
    kept = trained(tmp_path / "kept", keeper)
    assert keeper.pruner is not None
    assert len(keeper.pruner.history) == 3
    assert_identical(plain, kept)


class RemoveDead(Callback):
    """After an iteration, cuts the channels of a layer that have been dead from the start."""

    def __init__(self, layer: str, dead: list[int], iteration: int) -> None:
        self.layer, self.dead, self.iteration = layer, dead, iteration

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.iteration != self.iteration:
            return
        from pruning.engine.trace_groups import trace_groups

        graph = trace_groups(
            trainer.state.model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        )
        group = graph.group(self.layer)
        keep = [unit for unit in range(group.width) if unit not in self.dead]
        trainer.release()
        prune_channels(
            trainer.state.model,
            graph,
            {group: keep},
            optimizers=[trainer.state.optimizer],
            emas=[trainer.state.ema.module],
        )
        trainer.rebind()


def test_removing_dead_channels_continues_losses_and_momentum(tmp_path: Path) -> None:
    from image_classification.models import create_model

    dead = [1, 4, 5]
    torch.manual_seed(3)
    model = create_model("resnet20", num_classes=10)
    modules = dict(model.named_modules())
    with torch.no_grad():
        # Nothing comes out of a channel whose weights, scale and shift are zero, and no gradient comes back.
        modules["layer2.1.conv1"].weight[dead] = 0
        modules["layer2.1.bn1"].weight[dead] = 0
        modules["layer2.1.bn1"].bias[dead] = 0
        modules["layer2.1.conv2"].weight[:, dead] = 0
    whole, cut = Recorder(), Recorder()
    first = trained(tmp_path / "a", whole, model=copy.deepcopy(model))
    second = trained(tmp_path / "b", RemoveDead("layer2.1.conv1", dead, 7), cut, model=model)
    assert whole.losses == pytest.approx(cut.losses, rel=1e-5)
    keep = [c for c in range(32) if c not in dead]
    big, small = first.state.model.state_dict(), second.state.model.state_dict()
    torch.testing.assert_close(
        big["layer2.1.conv1.weight"][keep], small["layer2.1.conv1.weight"], rtol=1e-4, atol=1e-5
    )
    momenta = [
        trainer.state.optimizer.state[dict(trainer.state.model.named_parameters())["layer2.1.conv2.weight"]]
        for trainer in (first, second)
    ]
    torch.testing.assert_close(
        momenta[0]["momentum_buffer"][:, keep], momenta[1]["momentum_buffer"], rtol=1e-3, atol=1e-5
    )


def resumed(workspace: Path, pruning: PruningCallback) -> Trainer:
    payload = read_safely(workspace / "checkpoint.pth.tar")
    model = build_from_structure(Structure.from_plain(payload["structure"]))
    trainer = build_trainer(
        workspace=workspace, callbacks=(pruning,), model=model, epochs=2, ema=0.9, dropout=True
    )
    trainer.restore(payload)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("seed", range(4))
def test_killed_and_resumed_at_any_iteration(tmp_path: Path, seed: int) -> None:
    whole = trained(tmp_path / "whole", callback())
    stop_at = random.Random(seed).randrange(2, 23)
    with pytest.raises(KeyboardInterrupt):
        trained(
            tmp_path / "cut",
            callback(),
            Recorder(stop_at=stop_at),
            checkpoint={"checkpoint_interval": random.Random(seed).choice([1, 2, 5])},
        )
    if not (tmp_path / "cut" / "checkpoint.pth.tar").exists():
        pytest.skip("stopped before the first checkpoint")
    again = callback()
    assert_identical(whole, resumed(tmp_path / "cut", again))
    assert again.pruner is not None
    assert [record.iteration for record in again.pruner.history] == [3, 6, 9]


@pytest.mark.parametrize("where", ["score_groups", "prune_channels", "save_atomically"])
def test_killed_inside_a_rewrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Before scoring, within the rewrite, and while the checkpoint after it is written."""
    import image_classification.checkpoint
    import pruning.rewrites.one_rewrite
    import pruning.search.choosing

    whole = trained(tmp_path / "whole", callback(), checkpoint={"checkpoint_interval": 2})
    module = {
        "score_groups": pruning.search.choosing,
        "prune_channels": pruning.rewrites.one_rewrite,
        "save_atomically": image_classification.checkpoint,
    }[where]
    real = getattr(module, where)
    calls = []

    def die(*args: Any, **kwargs: Any) -> Any:
        calls.append(where)
        if len(calls) == (4 if where == "save_atomically" else 2):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, where, die)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "cut", callback(), checkpoint={"checkpoint_interval": 2})
    assert_identical(whole, resumed(tmp_path / "cut", callback()))


def test_one_shot_happens_once_before_training(tmp_path: Path) -> None:
    settings = {**PRUNED_ONCE, "pruning_criterion": "magnitude"}
    pruning = callback(**settings)
    trainer = trained(tmp_path, pruning, epochs=1)
    assert pruning.pruner is not None
    assert [record.iteration for record in pruning.pruner.history] == [0]
    assert pruning.pruner.costs.current("macs") <= 0.6 * pruning.pruner.costs.baseline("macs") * (1 + 1e-6)
    again = callback(**settings)
    resumed_trainer = resumed(tmp_path, again)
    assert again.pruner is not None
    assert len(again.pruner.history) == 1
    assert resumed_trainer.state.epoch == 2
    assert trainer.state.iteration == 12


def test_the_run_ends_with_the_costs_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruning = callback()
    assert (
        Console(1, live=False).format("pruning.macs_before", 91238400.0) == "pruning.macs_before 91,238,400"
    )
    trainer = build_trainer(workspace=tmp_path, callbacks=(pruning,), epochs=2, ema=0.9)
    logged: dict[str, object] = {}
    monkeypatch.setattr(
        trainer.logger, "log", lambda step, data, iteration=None: logged.update({} if step else data)
    )
    trainer.fit()
    costs = pruning.pruner.costs
    assert logged["pruning.macs_before"] == costs.baseline("macs")
    assert logged["pruning.macs_after"] == costs.current("macs") <= 0.7 * costs.baseline("macs") * (1 + 1e-6)


def test_learning_rate_recovers_after_a_rewrite(tmp_path: Path) -> None:
    factors: dict[int, float] = {}

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            factors[trainer.state.iteration] = trainer.state.lr_factor

    pruning = callback(pruning_step=6, pruning_delta=0.3, pruning_warmup=4)
    trained(tmp_path, pruning, Watch(), epochs=1)
    assert [factors[i] for i in range(5, 12)] == pytest.approx([1.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_announcement_names_rewrites_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    trainer = build_trainer(workspace=tmp_path, callbacks=(callback(pruning_step=4),), epochs=1)
    monkeypatch.setattr(trainer.logger, "message", said.append)
    trainer.fit()
    assert "3 of 3 rewrites to go" in said[0]
    assert "the last after iteration 12 of 12" in said[0]
