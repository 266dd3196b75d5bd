"""The training loop. Reads from top to bottom: fit → train epoch → train step → log, save, evaluate."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from image_classification.callbacks import Callback, TrainState
from image_classification.checkpoint import Checkpointer
from image_classification.data.loader import Batch, Loader
from image_classification.distributed import Distributed
from image_classification.evaluation import Evaluator
from image_classification.interrupts import StopRequested, StopSignals
from image_classification.metrics import TrainingSums
from image_classification.nan_guard import NanGuard, NonFiniteLossError
from image_classification.objective import Objective
from image_classification.observe.figures import Figure, register_figures, steering
from image_classification.observe.log import LogConfig, Logger
from image_classification.observe.meters import StepClock
from image_classification.plain_data import Plain
from image_classification.precision import Precision
from image_classification.resumable_loop import ResumableLoop, described_classifier
from image_classification.train_config import TrainConfig
from image_classification.wrapping import check_unwrapped, in_ddp

register_figures(
    "train",
    {
        "lr": Figure(".5g", steers=True),
        "grad_scale": Figure(".1f"),
        "epoch_seconds": Figure(".1f", "s", steers=True),
        "checkpoint_seconds": Figure(".3f", "s"),
        "skipped_updates": Figure(".0f", steers=True),
        "substituted_samples": Figure(".0f", steers=True),
    },
)

#: First iterations that are excluded from an epoch's speed: compilation and the choice of kernels happen there.
WARMUP_STEPS = 2


class Trainer(ResumableLoop):
    """Trains `state.model` on a loader, possibly over several ranks.

    The loop, and where the events of `Callback` fire:

        restore a checkpoint                                       (`restore`)
        on_fit_start
        for every epoch:
            on_epoch_start
            for every optimizer step:
                set the learning rate
                for every micro-batch:
                    on_batch_start
                    forward, loss, backward                        (gradients are exchanged in the last one)
                on_backward_end
                clip, update, zero gradients, average (EMA)
                iteration += 1
                on_step_end                                        (rewrites happen here; then `rebind`)
                every --print-freq: on_log; check for NaN
                every --checkpoint-interval: save                      (files are written in the background)
                if asked to stop: save, raise StopRequested
            validate; on_evaluate_end
            on_epoch_end
            save
        on_fit_end

    There is a host sync at logging steps, saves and validations only.

    Args:
        config: Length, accumulation, guard.
        state: Network (already on its device), optimizer, schedule, average.
        objective: Loss of a micro-batch.
        precision: Autocast and scaling.
        distributed: Ranks.
        logger: Console, report, TensorBoard.
        checkpointer: Writes checkpoints.
        train_loader: Micro-batches of this rank.
        evaluator: Validation, None to skip it.
        callbacks: Callbacks of the loop.
        clip_norm: Largest gradient norm.
        print_freq: Iterations between logging steps.
        saved_config: Resolved configuration, stored in checkpoints.
        describe: Returns `arch` and `structure` of a network for checkpoints; called again after every rewrite.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        *,
        objective: Objective,
        precision: Precision,
        distributed: Distributed,
        logger: Logger,
        checkpointer: Checkpointer,
        train_loader: Loader,
        evaluator: Evaluator | None = None,
        callbacks: Sequence[Callback] = (),
        clip_norm: float | None = None,
        print_freq: int = LogConfig.print_freq,
        saved_config: Plain | None = None,
        describe: Callable[[nn.Module], Plain] = described_classifier,
    ) -> None:
        self.config = config
        self.state = state
        self.objective = objective
        self.precision = precision
        self.distributed = distributed
        self.logger = logger
        self.checkpointer = checkpointer
        self.train_loader = train_loader
        self.evaluator = evaluator
        self.callbacks = list(callbacks)
        self.clip_norm = clip_norm
        self.print_freq = print_freq
        self.saved_config = saved_config or {}
        self.describe = describe
        self.accumulation = config.accumulation_steps(train_loader.batch_size, distributed.world_size)
        self.steps_per_epoch = len(train_loader) // self.accumulation
        self.sums = TrainingSums(distributed.device)
        self.guard = NanGuard(config.on_nan, config.nan_budget, distributed)
        self.clock = StepClock(distributed.world_size, num_warmup=WARMUP_STEPS)
        self.rebind()

    # ------------------------------------------------------------------ the network as it is called

    def rebind(self) -> None:
        """Wrap the network again: after construction and after every rewrite of `state.model`."""
        self.precision.forget_compiled()
        model = self.state.model
        wrapped = in_ddp(model, self.distributed.device) if self.distributed.world_size > 1 else model
        self._wrapped = wrapped
        self._forward, self._eval_forward = wrapped, model
        self._compile_at: int | None = self.state.iteration + self.precision.config.compile_after
        self._compile_when_due()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._description: Plain | None = None
        self.state.best = self.state.best_epoch = None

    def _compile_when_due(self) -> None:
        """Compile, if requested, once the network has kept its shape for long enough."""
        if self._compile_at is None or self.state.iteration < self._compile_at:
            return
        self._compile_at = None
        self._forward = self.precision.compiled(self._wrapped)
        bare = self.state.model
        self._eval_forward = self.precision.compiled(bare) if self._wrapped is not bare else self._forward

    def release(self) -> None:
        """Release the wrappers, and with them every reference to the old graph, before a rewrite. Collective.

        Afterwards `state.model` is the same network on all ranks, BN statistics included.

        Raises:
            NonFiniteLossError: The network is poisoned and cannot be rewritten.
        """
        self._check_finite()
        wrappers = [
            weakref.ref(wrapper)
            for wrapper in (self._wrapped, self._forward, self._eval_forward)
            if wrapper is not self.state.model
        ]
        del self._wrapped, self._forward, self._eval_forward
        self._parameters = []
        if wrappers:
            self.precision.forget_compiled()
            check_unwrapped(wrappers)
        self._share_buffers(self.state.model)

    # ------------------------------------------------------------------ fit

    def fit(self) -> dict[str, float]:
        """Train to the end of the training or of this invocation.

        Returns:
            Metrics of the last validation; empty without one.

        Raises:
            StopRequested: After a signal, once the state is saved.
            NonFiniteLossError: The loss is not finite and the policy is not to skip.
        """
        state = self.state
        figures: dict[str, float] = {}
        last_epoch = self.config.epochs
        if self.config.run_epochs > 0:
            last_epoch = min(last_epoch, state.epoch + self.config.run_epochs)
        with StopSignals(self.distributed) as stop, self.checkpointer.finished():
            self._emit("on_fit_start")
            self.checkpointer.claim()
            while state.epoch < last_epoch and not self._has_stalled():
                self._emit("on_epoch_start")
                self._train_epoch(stop)
                self._check_finite()
                figures = self._validate()
                self._emit("on_epoch_end")
                self._finish_epoch(figures)
            if state.epoch == self.config.epochs or self._has_stalled():
                self._emit("on_fit_end")
                self.checkpointer.finish()
                self._name_result()
                self._check_validated(figures)
        return figures

    def _check_validated(self, figures: dict[str, float]) -> None:
        """Refuse to end normally if no validation was finite.

        Raises:
            NonFiniteLossError: No validation was finite.
        """
        if figures and self.state.best is None and not math.isfinite(figures.get("val.loss", 0.0)):
            raise NonFiniteLossError(
                "no epoch has ended with a finite validation loss: the weights are finite, what they compute is not. "
                "Nothing was called best. Usual remedies: a lower `lr`, `warmup`, bf16 instead of fp16."
            )

    def _has_stalled(self) -> bool:
        """Whether the best network is `early_stopping_patience` epochs old."""
        patience = self.config.early_stopping_patience
        best_epoch = self.state.best_epoch
        return patience > 0 and best_epoch is not None and self.state.epoch - 1 - best_epoch >= patience

    def _name_result(self) -> None:
        """Log at the end which file to use, and the meaning of its metric."""
        state = self.state
        if not self.checkpointer.config.checkpoints or self.evaluator is None or state.best_epoch is None:
            return
        if state.epoch < self.config.epochs:
            self.logger.message(
                f"stopped after epoch {state.epoch - 1}: no better network for --early-stopping-patience "
                f"{self.config.early_stopping_patience} epochs"
            )
        which = "" if state.ema is None else ", of the averaged weights (EMA), which it is loaded with"
        self.logger.message(
            f"the network to use: {self.checkpointer.best_path}: val.{self.evaluator.headline} {state.best:.2f} % "
            f"after epoch {state.best_epoch}{which}"
        )

    def _train_epoch(self, stop: StopSignals) -> None:
        state = self.state
        self.train_loader.set_epoch(state.epoch)
        done = state.iteration - state.epoch * self.steps_per_epoch
        last = self.steps_per_epoch
        if self.config.prof >= 0:
            last = min(done + self.config.prof, last)
        state.model.train()
        batches = iter(self.train_loader)
        begin = time.perf_counter()
        self.clock.start()
        with self.logger.progress(self.steps_per_epoch, f"epoch {state.epoch}") as bar:
            bar.update(advance=done)
            for step in range(done, last):
                self._compile_when_due()
                self.train_step(batches)
                logging = (step + 1) % self.print_freq == 0 or step + 1 == last
                figures = self._log_window(step) if logging else {}
                bar.update(steering(figures))
                self._save_or_stop(stop)
        self._log_epoch(time.perf_counter() - begin)
        # A shortened epoch (`prof`) counts as a full one, so that iterations keep their position in the schedule.
        state.iteration = (state.epoch + 1) * self.steps_per_epoch

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Run one iteration: the batches of one optimizer step, and that step. There is no host sync.

        Args:
            batches: Source of batches; one is taken per round of gradient accumulation.
        """
        state = self.state
        num_images = 0
        state.schedule.apply(state.optimizer, state.iteration, state.lr_factor)
        self.guard.before_step(state.model)
        for index in range(self.accumulation):
            batch = next(batches)
            self.clock.data_ready()
            num_images += len(batch)
            self._emit("on_batch_start", batch)
            with self._synchronised(index == self.accumulation - 1):
                self._forward_backward(batch)
        self._emit("on_backward_end")
        if not self.guard.must_skip(state.iteration):
            self.precision.step(state.optimizer, self._parameters, self.clip_norm)
            if state.ema is not None:
                state.ema.update(state.model)
        state.optimizer.zero_grad(set_to_none=True)
        state.iteration += 1
        self._emit("on_step_end")
        self.clock.step_done(num_images)

    def _synchronised(self, synchronise: bool) -> contextlib.AbstractContextManager[object]:
        """Return a context that exchanges gradients only if `synchronise`, that is, in a step's last micro-batch."""
        if synchronise or not isinstance(self._wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._wrapped.no_sync()

    def _forward_backward(self, batch: Batch) -> None:
        with self.precision.autocast():
            loss, logits = self.objective(self._forward, batch.images, batch.targets)
        self.precision.backward(loss / self.accumulation)
        self.sums.update(loss, logits.detach(), batch.targets)
        self.guard.observe(loss, self.state.iteration, batch.sample_ids)

    # ------------------------------------------------------------------ log

    def _log_window(self, step: int) -> dict[str, float]:
        """Read the sums of the last window from the device and log them; collective."""
        self.guard.check()
        figures = self.sums.flush(self.distributed)
        figures |= self.clock.read("train")  # after the read above, so that the device's work is included
        figures |= {
            "train.lr": self.state.optimizer.param_groups[0]["lr"],
            "train.grad_scale": self.precision.scale,
        }
        if self.config.on_nan == "skip":
            figures["train.skipped_updates"] = float(self.guard.num_skipped)
        if self.train_loader.num_substituted:
            figures["train.substituted_samples"] = float(self.train_loader.num_substituted)
        self._emit("on_log", figures)
        self.logger.log((self.state.epoch, step), figures, iteration=self.state.iteration)
        return figures

    def _log_epoch(self, seconds: float) -> None:
        figures = self.sums.finish_epoch(self.distributed) | self.clock.read_epoch("train")
        figures["train.epoch_seconds"] = seconds
        if self.checkpointer.stood_still:
            figures["train.checkpoint_seconds"] = self.checkpointer.stood_still
            self.checkpointer.stood_still = 0.0
        self.logger.log((self.state.epoch,), figures, iteration=self.state.iteration)

    # ------------------------------------------------------------------ validate

    def _validate(self) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        self._share_buffers(self.state.model)
        figures = self.evaluator(self.state.model, self.logger, forward=self._eval_forward)
        if self.state.ema is not None:
            self._share_buffers(self.state.ema.module)
            figures |= self.evaluator(self.state.ema.module, self.logger, prefix="val_ema")
        self.logger.log((self.state.epoch,), figures, iteration=self.state.iteration)
        self._emit("on_evaluate_end", figures)
        return figures

    def _share_buffers(self, model: nn.Module) -> None:
        """Broadcast rank 0's BN statistics to all ranks; collective."""
        self.distributed.broadcast_tensors(list(model.buffers()))

    def _finish_epoch(self, figures: dict[str, float]) -> None:
        state = self.state
        state.epoch += 1
        self.train_loader.set_epoch(state.epoch)
        is_best = False
        if figures and self.evaluator is not None:
            headline = self.evaluator.headline
            prefix = "val" if state.ema is None else "val_ema"
            figure = figures[f"{prefix}.{headline}"]
            sound = math.isfinite(figure) and math.isfinite(figures[f"{prefix}.loss"])
            is_best = sound and (state.best is None or figure > state.best)
            if is_best:
                state.best, state.best_epoch = figure, state.epoch - 1
            if not sound:
                self.logger.message(
                    f"validation is not finite after epoch {state.epoch - 1}: this network is not called best"
                )
        self.save(is_best=is_best, end_of_epoch=True)

    # ------------------------------------------------------------------ save, stop

    def _save_or_stop(self, stop: StopSignals) -> None:
        self.checkpointer.check()
        interval = self.checkpointer.config.checkpoint_interval
        stopping = stop.poll(self.state.iteration)
        if stopping or (interval and self.state.iteration % interval == 0):
            self.save()
        if stopping:
            self.checkpointer.finish()
            raise StopRequested(
                f"stopped by {stop.received or 'a signal to another rank'} after iteration {self.state.iteration}",
                saved=self.checkpointer.config.checkpoints,
            )

    def _emit(self, event: str, *arguments: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)
