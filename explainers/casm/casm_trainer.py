"""Trains classifier and decoder together (Żołna et al. 2020, algorithm 1), inside the common training loop.

Note: The published program steps the classifier before it differentiates the decoder's loss through it, which current
PyTorch refuses; here each loss is differentiated before any parameter in its graph is changed. The mask is made from
the features before the clean step and judged after it, as published. Past classifiers judge in evaluation mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explainers.casm.casm_objective import decoder_loss, mask_figures, summary
from explainers.casm.decoder import enlarged
from explainers.casm.model import KEY, Casm
from explainers.casm.presets import CasmConfig
from explainers.casm.store import PastClassifiers
from explainers.casm.validation import CasmValidation
from explainers.differentiable.features import FeatureTaps
from image_classification.callbacks import Callback, TrainLoop
from image_classification.config import check
from image_classification.data.loader import Batch
from image_classification.finite import learned_tensors, optimizer_tensors
from image_classification.models.fitting_weights import load_exactly
from image_classification.observe.figures import Figure, register_figures
from image_classification.plain_data import Plain
from image_classification.resumable_loop import taking_up
from image_classification.schedules import Schedule
from image_classification.trainer import Trainer
from image_classification.wrapping import in_ddp

TRAINING_KEY = "casm_training"

register_figures(
    "train",
    {
        "decoder_loss": Figure(".4f"),
        "lr_casm": Figure(".5g"),
        "confused": Figure(".1f", "%"),
    },
)


class CasmTrainer(Trainer):
    """`Trainer` whose step trains a classifier and CASM's decoder.

        clean:   f on x; f is updated by the cross-entropy, unless it is fixed
        mask:    s = decoder(features of that pass)
        judge:   a stored past f with probability h, else f itself
        masked:  the judge on x·(1 − s); the decoder is updated by `decoder_loss`; f too, by its cross-entropy, if it
                 was the judge

    Everything else (epochs, logging, checkpoints, signals, resume) is the common loop's; `on_backward_end` does not
    fire, since there is no single backward pass.

    Args:
        casm: Classifier (the same object as `state.model`) and decoder.
        settings: Thinning and learning rates.
        validation: Computes figures after each epoch, None for none.
        decoder_schedule: Learning rate of the decoder.
        parts: Arguments of `Trainer`, by name.
    """

    def __init__(
        self,
        casm: Casm,
        settings: CasmConfig,
        *,
        validation: CasmValidation | None,
        decoder_schedule: Schedule,
        **parts: Any,
    ) -> None:
        self.casm = casm
        self.settings = settings
        self.thinning = settings.thinning
        self.validation = validation
        self.decoder_schedule = decoder_schedule
        # Adam with the decay in the gradient, as published.
        self.decoder_optimizer = torch.optim.Adam(
            casm.decoder.parameters(), lr=settings.lr_casm, weight_decay=settings.weight_decay
        )
        seed = parts["config"].seed
        self.past = PastClassifiers(settings.num_past, self.thinning.store_every, self.thinning.past, seed)
        if self.thinning.fixed:
            casm.classifier.requires_grad_(False)
        super().__init__(**(parts | {"callbacks": [_MaskFigures(self), *parts["callbacks"]]}))
        # Sums over images: decoder loss, right when masked, right only when whole, number of images, `mask_figures`.
        self.mask_sums = torch.zeros(8, dtype=torch.float64, device=self.distributed.device)
        self.steps_per_epoch = epoch_length(len(self.train_loader), settings.pot)

    # ------------------------------------------------------------------ the networks as they are called

    def rebind(self) -> None:
        """Wrap classifier and decoder for several ranks; a fixed classifier has no gradients to synchronise."""
        several = self.distributed.world_size > 1
        if self.thinning.fixed:
            model = self.state.model
            self._wrapped = self._forward = self._eval_forward = model
            self._compile_at = None
            self._parameters = []
            self._description = None
        else:
            super().rebind()
        self._decode: nn.Module = self.casm.decoder
        if several:
            self._decode = in_ddp(self.casm.decoder, self.distributed.device)

    # ------------------------------------------------------------------ one step

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One step of classifier and decoder; see `Trainer.train_step`."""
        state = self.state
        state.schedule.apply(state.optimizer, state.iteration, state.lr_factor)
        self.decoder_schedule.apply(self.decoder_optimizer, state.iteration, state.lr_factor)
        self.casm.decoder.train()
        if self.thinning.fixed:
            state.model.eval()
        batch = next(batches)
        self.clock.data_ready()
        self._emit("on_batch_start", batch)
        if self.past.wants(state.iteration):
            self._share_buffers(state.model)
            self.past.add(state.model, state.iteration)
        logits, features = self._clean_pass(batch)
        self._masked_pass(batch, logits, features)
        state.iteration += 1
        self._emit("on_step_end")
        self.clock.step_done(len(batch))

    def _clean_pass(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Train f on whole images; return its logits and features, detached."""
        casm = self.casm
        fixed = self.thinning.fixed
        with (
            torch.set_grad_enabled(not fixed),
            FeatureTaps(casm.classifier, casm.taps, casm.kept, casm.widths) as taps,
            self.precision.autocast(),
        ):
            loss, logits = self.objective(self._forward, batch.images, batch.targets)
            features = [feature.detach() for feature in taps.features]
        if not fixed:
            self._update_classifier(loss)
        self.sums.update(loss, logits.detach(), batch.targets)
        self.guard.observe(loss, self.state.iteration, batch.sample_ids)
        return logits.detach(), features

    def _masked_pass(self, batch: Batch, clean_logits: Tensor, features: list[Tensor]) -> None:
        """Make masks and judge the masked images; train the decoder, and f too if it was the judge."""
        drawn = self.past.drawn(self.state.iteration)
        judge = self._forward if drawn is None else self.past.judge(drawn, self.casm.classifier)
        with self.precision.autocast():
            mask = enlarged(self._decode(features), batch.images.shape[2:], self.casm.upsample)
        # A separate leaf cuts the graph between judge and decoder, so that either can be updated first.
        leaf = mask.detach().requires_grad_()
        with self.precision.autocast():
            masked_loss, logits = self.objective(judge, batch.images * (1 - leaf), batch.targets)
        loss = decoder_loss(
            clean_logits,
            logits,
            batch.targets,
            leaf,
            lambda_r=self.thinning.lambda_r,
            adversarial=self.settings.adversarial,
        )
        trains_judge = drawn is None and not self.thinning.fixed
        self.precision.backward(loss, inputs=[leaf], retain_graph=trains_judge)
        mask.backward(leaf.grad)
        self.precision.step(
            self.decoder_optimizer, list(self.casm.decoder.parameters()), self.settings.clip_casm
        )
        self.decoder_optimizer.zero_grad(set_to_none=True)
        if trains_judge:
            self._update_classifier(masked_loss)
        self._count(loss, clean_logits, logits.detach(), leaf.detach(), batch)

    def _update_classifier(self, loss: Tensor) -> None:
        self.precision.backward(loss)
        self.precision.step(self.state.optimizer, self._parameters, self.clip_norm)
        self.state.optimizer.zero_grad(set_to_none=True)

    def _count(self, loss: Tensor, clean: Tensor, masked: Tensor, mask: Tensor, batch: Batch) -> None:
        """Accumulate sums for the log, without a host sync."""
        self.guard.observe(loss, self.state.iteration, batch.sample_ids)
        right, fooled = clean.argmax(1) == batch.targets, masked.argmax(1) != batch.targets
        count = torch.full((), len(batch), dtype=torch.float64, device=mask.device)
        first = torch.stack(
            [loss.detach().double() * count, (~fooled).sum().double(), (right & fooled).sum().double(), count]
        )
        self.mask_sums += torch.cat([first, mask_figures(mask).sum(0)])

    def read_masks(self) -> dict[str, float]:
        """Return the figures of the masks since the last call, over all ranks. Collective."""
        (sums,) = self.distributed.all_reduce_sum(self.mask_sums)
        self.mask_sums.zero_()
        loss, right, confused, count = sums[:4].tolist()
        if not count:
            return {}
        figures = {
            "decoder_loss": loss / count,
            "masked_top1": 100 * right / count,
            "confused": 100 * confused / count,
            **summary(sums[4:], count),
        }
        return {f"train.{name}": value for name, value in figures.items()} | {
            "train.lr_casm": self.decoder_optimizer.param_groups[0]["lr"]
        }

    # ------------------------------------------------------------------ validate, save, restore

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        self._share_buffers(self.casm)
        figures = self.validation(self.casm, self.logger, self.state.iteration)
        self.logger.log((self.state.epoch,), figures, iteration=self.state.iteration)
        self._emit("on_evaluate_end", figures)
        return figures

    def learned(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer.learned`; includes the decoder and its optimizer."""
        yield from super().learned()
        yield from learned_tensors(self.casm.decoder, "decoder.")
        yield from optimizer_tensors(self.decoder_optimizer, "decoder's optimizer ")

    def _payload(self) -> dict[str, object]:
        training = {
            "optimizer": self.decoder_optimizer.state_dict(),
            "past": self.past.state_dict(),
            "thinning": dataclasses.asdict(self.thinning),
            "adversarial": self.settings.adversarial,
        }
        return {**super()._payload(), KEY: self.casm.entry(), TRAINING_KEY: training}

    def restore(self, payload: Plain) -> None:
        """Resume from a checkpoint, bit for bit; see `Trainer.restore`.

        Raises:
            ValueError: The checkpoint is not a CASM or has other settings.
        """
        check(
            TRAINING_KEY in payload,
            "--resume: the checkpoint holds a classifier only, no saliency mapping: give one of `python -m explainers "
            "train-casm`, or start from a classifier with --pretrained-weights",
        )
        with taking_up("the saliency mapping"):
            self._restore_casm(payload)
        super().restore(payload)

    def _restore_casm(self, payload: Plain) -> None:
        saved = payload[TRAINING_KEY]
        present = {**dataclasses.asdict(self.thinning), "adversarial": self.settings.adversarial}
        before = {**saved["thinning"], "adversarial": saved["adversarial"]}
        changed = [
            f"{name} was {before[name]}, is {value}"
            for name, value in present.items()
            if before[name] != value
        ]
        check(not changed, f"--resume: {'; '.join(changed)}: give the settings that the run was started with")
        check(
            payload["steps_per_epoch"] == self.steps_per_epoch,
            f"--resume: the checkpoint counts {payload['steps_per_epoch']} iterations per epoch, now there would be "
            f"{self.steps_per_epoch}: give the same data, --batch-size and --pot",
        )
        entry = payload[KEY]
        check(
            tuple(entry["taps"]) == self.casm.taps
            and tuple(entry["channels"]) == self.casm.decoder.channels
            and entry["width"] == self.casm.decoder.width,
            "--resume: the checkpoint's decoder has another shape: give the same --decoder-width and --image-size",
        )
        load_exactly(self.casm.decoder, entry["decoder"], Path("the checkpoint"), "decoder")
        # Optimizer settings (decay) follow this run's flags, as the classifier's do.
        groups = self.decoder_optimizer.state_dict()["param_groups"]
        self.decoder_optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        self.past.load_state_dict(saved["past"])


class _MaskFigures(Callback):
    """Adds the figures of the masks to the log."""

    def __init__(self, trainer: CasmTrainer) -> None:
        self.trainer = trainer

    def on_log(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """See `Callback.on_log`."""
        figures |= self.trainer.read_masks()


def epoch_length(num_batches: int, share: float) -> int:
    """Number of iterations of an epoch over a share of the training set, at least one."""
    return max(round(share * num_batches), 1)
