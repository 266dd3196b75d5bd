"""Loops that others have written: each trains on after two rewrites, and as a network that was built small.

After the second rewrite the network is saved and loaded: what comes back was built small. With the same weights and the
state of the loop it has to train as the rewritten one does, to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.checkpoint import checkpoint

from pruning import Pruner, load_pruned

X = torch.randn(4, 8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4
BATCHES = [(x, Y) for x in X]


class Net(nn.Module):
    """A stem, a residual block and a head. `how`: runs the block, with the block and its input."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.how = how
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        first, second = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.block = nn.Sequential(first, nn.GroupNorm(1, 12), nn.ReLU(), second)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + (self.block(x) if self.how is None else self.how(self.block, x))
        return self.head(torch.relu(x).mean((2, 3)))


class Loop:
    """Plain training by SGD with momentum; subclasses change a part of it.

    Attributes:
        model: What the loop calls, possibly wrapped.
        optimizer: What the loop steps; it is given to the pruner.
        average: An average of the network, if the loop keeps one.
        parts: Whatever else has a state dict.
    """

    average: Any = None

    def __init__(self, network: nn.Module) -> None:
        self.model, self.optimizer = network, torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
        self.parts: list[Any] = []

    @property
    def network(self) -> nn.Module:
        """The bare network."""
        return self.model

    def loss(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), Y)

    def step(self, x: Tensor) -> None:
        self.loss(x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, num_steps: int) -> None:
        self.model.train()
        for number in range(num_steps):
            self.step(X[number % len(X)])

    def take(self, other: Loop) -> None:
        """Go on where another loop is, by what checkpoints hold."""
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        for mine, its in zip(self.parts, other.parts, strict=True):
            mine.load_state_dict(copy.deepcopy(its.state_dict()))


class Averaging(Loop):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.average = AveragedModel(network, avg_fn=get_ema_avg_fn(0.8), use_buffers=True)
        self.parts = [self.average]

    def step(self, x: Tensor) -> None:
        super().step(x)
        self.average.update_parameters(self.model)


class Accumulating(Loop):
    """Two batches a step; rewrites come in the middle."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.count = 0

    def step(self, x: Tensor) -> None:
        self.loss(x).div(2).backward()
        self.count += 1
        if self.count % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def take(self, other: Any) -> None:
        super().take(other)
        self.count = other.count
        for mine, its in zip(self.network.parameters(), other.network.parameters(), strict=True):
            mine.grad = None if its.grad is None else its.grad.clone()


class Scheduled(Loop):
    """AdamW, a schedule that moves learning rate and momentum, and a gradient scaler."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.optimizer = torch.optim.AdamW(network.parameters(), 1e-3, amsgrad=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=40)
        self.schedule, self.scaler = schedule, torch.amp.GradScaler("cpu")
        self.parts = [self.schedule, self.scaler]

    def step(self, x: Tensor) -> None:
        self.scaler.scale(self.loss(x)).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()


class Autocasting(Loop):
    def loss(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().loss(x)


class SharpnessAware(Loop):
    """SAM (Foret et al. 2021) as the two steps of its reference code, around SGD."""

    def step(self, x: Tensor) -> None:
        self.loss(x).backward()
        held = list(self.network.parameters())
        norm = torch.stack([parameter.grad.norm() for parameter in held]).norm()
        with torch.no_grad():
            for parameter in held:
                self.optimizer.state[parameter]["old_p"] = parameter.detach().clone()
                parameter.add_(parameter.grad * (0.05 / norm))
        self.optimizer.zero_grad()
        self.loss(x).backward()
        for parameter in held:
            parameter.data.copy_(self.optimizer.state[parameter]["old_p"])
        self.optimizer.step()
        self.optimizer.zero_grad()


class Accelerated(Loop):
    def __init__(self, network: nn.Module) -> None:
        accelerate = pytest.importorskip("accelerate")
        super().__init__(network)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.bare = network
        self.model, self.optimizer = self.accelerator.prepare(network, self.optimizer)

    @property
    def network(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def step(self, x: Tensor) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.loss(x))
            self.optimizer.step()
            self.optimizer.zero_grad()


class Updated(nn.Module):
    """A frozen convolution with a low-rank update that trains."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


def low_rank() -> nn.Module:
    network = Net()
    network.block[3] = Updated(network.block[3])
    return network


def with_peft() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["0", "3"], modules_to_save=["head"], init_lora_weights=False
    )
    return peft.get_peft_model(Net(), config)


def reentrant() -> nn.Module:
    return Net(lambda block, x: checkpoint(block, x, use_reentrant=True))


def not_reentrant() -> nn.Module:
    return Net(lambda block, x: checkpoint(block, x, use_reentrant=False))


CASES: dict[str, tuple[Callable[[], nn.Module], type[Loop]]] = {
    "plain": (Net, Loop),
    "checkpointed, reentrant": (reentrant, Loop),
    "checkpointed, not reentrant": (not_reentrant, Loop),
    "low-rank updates": (low_rank, Loop),
    "peft": (with_peft, Loop),
    "averaging": (Net, Averaging),
    "accumulating": (Net, Accumulating),
    "scheduled": (Net, Scheduled),
    "autocast": (Net, Autocasting),
    "sam": (Net, SharpnessAware),
    "accelerate": (Net, Accelerated),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("criterion", ["discriminant", "taylor"])
def test_a_loop_trains_on_as_with_a_network_built_small(name: str, criterion: str, tmp_path: Path) -> None:
    build, kind = CASES[name]
    torch.manual_seed(0)
    loop = kind(build())
    pruner = Pruner(loop.network, X[0, :2], criterion=criterion, budget=0.6, delta=0.2, search="global",
                    optimizer=loop.optimizer, ema=loop.average)  # fmt: skip
    while not pruner.done:
        loop.run(3)
        pruner.step(BATCHES)
    assert pruner.completed == 2
    pruner.save(tmp_path / "small.pth", factory=build)
    small = load_pruned(tmp_path / "small.pth", factory=build)
    for mine, its in zip(small.parameters(), loop.network.parameters(), strict=True):
        mine.requires_grad_(its.requires_grad)
    other = kind(small)
    other.take(loop)
    loop.run(3)
    other.run(3)
    for (key, mine), its in zip(
        other.network.state_dict().items(), loop.network.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, its), key
    if loop.average is not None:
        for mine, its in zip(other.average.parameters(), loop.average.parameters(), strict=True):
            assert torch.equal(mine, its)


def test_lightning_trains_on_as_with_a_network_built_small(tmp_path: Path) -> None:
    """Rewrites in a callback, after the third and the sixth of nine steps."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, number: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    class Pruning(lightning.Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            self.pruner = Pruner(
                module.net, X[0, :2], budget=0.6, delta=0.2, step=3, optimizer=trainer.optimizers
            )

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int
        ) -> None:
            outputs.clear()  # the loss of this step
            if self.pruner.due(number + 1):
                self.pruner.step(BATCHES, number + 1)
            if number == 5:
                self.pruner.save(tmp_path / "small.pth", factory=Net)
                self.state = copy.deepcopy(trainer.optimizers[0].state_dict())

    torch.manual_seed(0)
    module, pruning = Module(), Pruning()
    data = torch.utils.data.DataLoader([BATCHES[number % 4] for number in range(9)], batch_size=None)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[pruning], **quiet)
    trainer.fit(module, data)
    assert pruning.pruner.done
    small = load_pruned(tmp_path / "small.pth", factory=Net)
    loop = Loop(small)
    loop.optimizer.load_state_dict(pruning.state)
    small.train()
    for number in (6, 7, 8):
        loop.step(BATCHES[number % 4][0])
    for (key, mine), its in zip(small.state_dict().items(), module.net.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0, msg=key)
