"""The steps of a router's training."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor

from loraweave.composer.batches import IGNORED, TargetBatch, losses_of, target_logits
from loraweave.composer.router_training.best import Best, copied, put
from loraweave.composer.router_training.first_step import require_gradients
from loraweave.composer.router_training.kept_state import KeptState
from loraweave.composer.router_training.passes import Pass, passes, streams, target_batch, told_apart
from loraweave.composer.router_training.rows import TrainingRow
from loraweave.composer.router_training.settings import Settings
from loraweave.composer.router_training.terms import balance_loss, z_loss
from loraweave.composer.router_training.watch import Watch
from loraweave.composer.training.seeding import seeded
from loraweave.errors import TrainingError
from loraweave.routers.routing.learned_router import LearnedRouter, Step
from loraweave.routers.routing.training_report import TrainingReport

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
        accelerator: Any,
        bar: Progress,
    ) -> None:
        model: Any = engine.model
        self._model, self._tokenizer = model, engine.tokenizer
        self._router, self._settings, self._held = router, settings, held
        self._accelerator, self._bar = accelerator, bar
        self._parameters = [parameter for parameter in router.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=settings.highest_rate, weight_decay=settings.weight_decay)
        head = self._model.get_output_embeddings()
        self._head_is_routed = any(self._model.get_submodule(layer) is head for layer in router.layers)
        self._streams = streams(rows, router.experts, settings.seed, apart=router.apart)
        self._taught = {row.expert for row in rows}
        self._report = TrainingReport(router.experts, settings=settings.determining())
        self._kept: dict[Any, Any] = {}
        self._best = Best()
        # after how many steps, and which, parameters the loss was last finite with
        self._good: tuple[int, list[Tensor]] = (0, [])

    def all_steps(self, state: KeptState, started: float) -> None:
        """Takes what steps are left, and leaves the router with the best parameters and its report."""
        first, recent = self._resumed(state)
        self._good = (first, copied(self._parameters))
        layers = self._router.members.layers.values()
        watch = self._watch = Watch(
            [layer.experts for layer in layers], self._report, self._settings.steps, sorted(self._taught)
        )
        watch.recent.extend(recent)
        before, settings = self._report.seconds, self._settings
        shown = self._bar.add_task(f"fit {self._router.name}", total=settings.steps, completed=first, seen="")
        for number in range(first + 1, settings.steps + 1):
            if number == 1:
                self._evaluate(0)
            loss = self._step(number)
            seen = watch.stepped(number)
            if number % settings.evaluate_every == 0 or number == settings.steps:
                self._evaluate(number)
            self._report.seconds = before + time.monotonic() - started
            self._bar.update(shown, advance=1, seen=f"loss {loss:.3f}{self._shown_evaluation()}{seen}")
            stops = settings.patience is not None and self._best.waited >= settings.patience
            if number % settings.checkpoint_every == 0 or number == settings.steps or stops:
                self._save(state, number)
            if stops:
                break
        self._finish()

    def _step(self, number: int) -> float:
        """One step of the optimizer; the mean loss over its target tokens."""
        settings = self._settings
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate(number - 1)
        self._optimizer.zero_grad()
        groups = [stream.at(number - 1, settings.batch_size) for stream in self._streams]
        num_passes = settings.gradient_accumulation or len(groups)
        self._router.train()
        totals: dict[str, float] = {}
        for index, part in enumerate(passes(groups, num_passes)):
            for name, value in self._pass(number, index, part).items():
                totals[name] = totals.get(name, 0.0) + value
        loss = totals.pop("loss") / len(groups)
        self._require_finite(number, {"the loss": loss, **{f"term {name!r}": value for name, value in totals.items()}})
        if number == 1:
            require_gradients(self._router, self._taught)
        norm = self._gradient_norm()
        self._require_finite(number, {"the length of the gradient": norm})
        if settings.clip is not None and not self._router.apart and norm > settings.clip:
            for parameter in self._parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(settings.clip / norm)
        self._good = (number - 1, copied(self._parameters))
        self._optimizer.step()
        self._report.losses.append(loss)
        for name, value in totals.items():
            self._report.terms.setdefault(name, []).append(value)
        return loss

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
                    losses_BK = self._losses(inputs)
                loss = (losses_BK.sum(dim=1) * part.per_token_B.to(device)).sum()
                terms = {name: part.share * value for name, value in self._terms(step).items()}
                self._accelerator.backward(torch.stack([loss, *terms.values()]).sum())
        finally:
            self._router.step = None
        self._watch.saw(step)
        self._report.tokens += sum(map(len, part.rows))
        return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in terms.items()}}

    def _losses(self, inputs: TargetBatch) -> Tensor:
        """loss_BK of each target token. Where the head is a routed layer, it sees all tokens that the others see."""
        return losses_of(target_logits(self._model, inputs, whole=self._head_is_routed), inputs.targets_BK)

    def _terms(self, step: Step) -> dict[str, Tensor]:
        """The router's own terms, and those of the settings, with their coefficients."""
        terms = dict(self._router.losses(step))
        if self._settings.balance:
            terms["balance"] = self._settings.balance * balance_loss(step)
        if self._settings.z:
            terms["z"] = self._settings.z * z_loss(step)
        return terms

    def _gradient_norm(self) -> float:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))

    def _require_finite(self, number: int, values: dict[str, float]) -> None:
        """Raises TrainingError, with the last good parameters put back, for a value that is not finite."""
        for name, value in values.items():
            if math.isfinite(value):
                continue
            good, values_then = self._good
            put(values_then, self._parameters)
            raise TrainingError(
                f"{name} is {value} at step {number} of router {self._router.name!r}: lower lr, or look for damaged rows. "
                f"The router has the parameters after {good} steps, with which it was last finite"
            )

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
                total += float(self._losses(inputs).sum())
            count += int((inputs.targets_BK != IGNORED).sum())
        loss = total / count
        self._require_finite(number + 1, {"the loss of the rows held out": loss})
        self._report.evaluations.append((number, loss))
        if self._best.judge(loss, self._parameters):
            self._report.kept = number

    def _shown_evaluation(self) -> str:
        return f"  held out {self._report.evaluations[-1][1]:.3f}" if self._report.evaluations else ""

    def _save(self, state: KeptState, number: int) -> None:
        recent = list(self._watch.recent)
        state.save(number, self._parameters, self._optimizer, self._best.values, recent, self._report)

    def _resumed(self, state: KeptState) -> tuple[int, Sequence[Tensor]]:
        """How many steps were done before, by this call when it was interrupted, and the load of the last ones."""
        found = state.restore(self._parameters, self._optimizer)
        if found is None:
            return 0, ()
        step, values, recent, self._report = found
        self._best = Best.again([loss for _, loss in self._report.evaluations], values)
        return step, recent

    def _finish(self) -> None:
        if self._best.values:
            put(self._best.values, self._parameters)
        else:
            self._report.kept = len(self._report.losses)
        self._router.report = self._report.to_json()
