"""The steps of a router's training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor

from loraweave.composer.batches import IGNORED, TargetBatch, losses_of, target_logits
from loraweave.composer.router_training.first_step import require_gradients
from loraweave.composer.router_training.kept_state import KeptState
from loraweave.composer.router_training.passes import Pass, passes, streams, target_batch, told_apart
from loraweave.composer.router_training.rows import TrainingRow
from loraweave.composer.router_training.settings import Settings
from loraweave.composer.router_training.terms import balance_loss, z_loss
from loraweave.composer.router_training.training_progress import TrainingProgress
from loraweave.composer.router_training.watch import Watch
from loraweave.composer.training.seeding import seeded
from loraweave.routers.routing.learned_router import LearnedRouter, Step

if TYPE_CHECKING:
    from loraweave.composer.composer import Composer


class Run:
    """One training, inside an activation of its router."""

    def __init__(
        self,
        engine: Composer,
        router: LearnedRouter,
        settings: Settings,
        rows: Sequence[TrainingRow],
        held: Sequence[TrainingRow],
        kept: KeptState,
        accelerator: Any,
        bar: Progress,
    ) -> None:
        model: Any = engine.model
        self._model, self._tokenizer = model, engine.tokenizer
        self._router, self._settings, self._held = router, settings, held
        self._accelerator, self._bar = accelerator, bar
        learning = [parameter for parameter in router.parameters() if parameter.requires_grad]
        self._progress = TrainingProgress(
            learning, settings, router.experts, kept, learner=f"router {router.name!r}", owner="router"
        )
        head = self._model.get_output_embeddings()
        self._head_is_routed = any(self._model.get_submodule(layer) is head for layer in router.layers)
        self._streams = streams(rows, router.experts, settings.seed, apart=router.apart)
        self._taught = {row.expert for row in rows}
        layers = router.members.layers.values()
        report = self._progress.report
        self._watch = Watch([layer.experts for layer in layers], report, settings.steps, sorted(self._taught))
        self._watch.recent.extend(self._progress.recent)
        self._kept: dict[Any, Any] = {}

    def all_steps(self) -> None:
        """Takes what steps are left, and leaves the router with the best parameters and its report."""
        progress, steps = self._progress, self._settings.steps
        shown = self._bar.add_task(f"fit {self._router.name}", total=steps, completed=progress.first, seen="")
        for number in range(progress.first + 1, steps + 1):
            if number == 1:
                self._evaluate(0)
            self._step(number)
            seen = self._watch.stepped(number)
            if progress.evaluates(number):
                self._evaluate(number)
            progress.timed()
            self._bar.update(shown, advance=1, seen=progress.shown(seen))
            progress.save(number, list(self._watch.recent))
            if progress.stops:
                break
        self._router.report = progress.finish()

    def _step(self, number: int) -> None:
        """One step of the optimizer, down the mean loss over its target tokens."""
        settings, progress = self._settings, self._progress
        for group in progress.optimizer.param_groups:
            group["lr"] = settings.rate(number - 1)
        progress.optimizer.zero_grad()
        groups = [stream.at(number - 1, settings.batch_size) for stream in self._streams]
        num_passes = settings.gradient_accumulation or len(groups)
        self._router.train()
        totals: dict[str, float] = {}
        for index, part in enumerate(passes(groups, num_passes)):
            for name, value in self._pass(number, index, part).items():
                totals[name] = totals.get(name, 0.0) + value
        loss = totals.pop("loss") / len(groups)
        progress.require_finite(number, {"the loss": loss, **{f"term {name!r}": value for name, value in totals.items()}})
        if number == 1:
            require_gradients(self._router, self._taught)
        norm = progress.gradient_norm(number)
        if settings.clip is not None and not self._router.apart and norm > settings.clip:
            for parameter in progress.parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(settings.clip / norm)
        progress.good(number - 1)
        progress.optimizer.step()
        progress.stepped(loss, totals)

    def _pass(self, number: int, index: int, part: Pass) -> dict[str, float]:
        """Adds the gradient of one pass; what it contributes to the step's loss and to each term."""
        inputs, decoder_BT = target_batch(self._model, self._tokenizer, part.rows), None
        if self._model.config.is_encoder_decoder:
            inputs = told_apart(inputs)
            decoder_BT = inputs.targets_BK != IGNORED
        device = inputs.targets_BK.device
        mask_BT = inputs.inputs["attention_mask"]
        experts_B = torch.tensor([row.expert for row in part.rows], device=device)
        rows_B = torch.tensor([row.number for row in part.rows])
        places = range(part.first, part.first + len(part.rows))
        seeds_B = tuple(seeded(self._settings.seed, "row", number, place).initial_seed() for place in places)
        step = self._router.step = Step(mask_BT, experts_B, rows_B, self._kept, decoder_BT=decoder_BT, seeds_B=seeds_B)
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                torch.manual_seed(seeded(self._settings.seed, "dropout", number, index).initial_seed())
                with self._accelerator.autocast():
                    losses_BK = self._losses(number, inputs)
                loss = (losses_BK.sum(dim=1) * part.per_token_B.to(device)).sum()
                terms = {name: part.share * value for name, value in self._terms(step).items()}
                self._accelerator.backward(torch.stack([loss, *terms.values()]).sum())
        finally:
            self._router.step = None
        self._watch.saw(step)
        self._progress.report.tokens += sum(map(len, part.rows))
        return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in terms.items()}}

    def _losses(self, number: int, inputs: TargetBatch) -> Tensor:
        """loss_BK of each target token. Where the head is a routed layer, it sees all tokens that the others see."""
        with self._progress.finite_weights(number):
            return losses_of(target_logits(self._model, inputs, whole=self._head_is_routed), inputs.targets_BK)

    def _terms(self, step: Step) -> dict[str, Tensor]:
        """The router's own terms, and those of the settings, with their coefficients."""
        terms = dict(self._router.losses(step))
        if self._settings.balance:
            terms["balance"] = self._settings.balance * balance_loss(step)
        if self._settings.z:
            terms["z"] = self._settings.z * z_loss(step)
        return terms

    @torch.no_grad()
    def _evaluate(self, number: int) -> None:
        """The mean loss over the target tokens of the rows held out, with the router as it will be used."""
        if not self._held:
            return
        self._router.eval()
        total, count = 0.0, 0
        ordered = sorted(self._held, key=len)
        for start in range(0, len(ordered), self._settings.batch_size):
            inputs = target_batch(self._model, self._tokenizer, ordered[start : start + self._settings.batch_size])
            with self._accelerator.autocast():
                total += float(self._losses(number + 1, inputs).sum())
            count += int((inputs.targets_BK != IGNORED).sum())
        self._progress.evaluated(number, total / count)
