"""The steps of a router's training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn

from loraweave.common.descent import Processes, seeded
from loraweave.common.display import progress_bar
from loraweave.common.options import NonNegative
from loraweave.composer.model.batches import (
    IGNORED,
    NO_TOKENIZER,
    TargetBatch,
    batch,
    entropies_of,
    losses_of,
    pad_apart,
    target_logits,
    untouched,
)
from loraweave.composer.train.jobs import Stream
from loraweave.composer.train.progress import KeptState, TrainingProgress, TrainingSettings, checkpointed_blocks
from loraweave.composer.train.rows import Owners, RowReader, TrainingRow
from loraweave.errors import TrainingError
from loraweave.routers.losses.z import z
from loraweave.routers.tokens._learned import LearnedRouter, Step
from loraweave.routers.tokens._router import TokenRouter


@dataclass(frozen=True)
class RouterSettings(TrainingSettings):
    """The settings of a router's training, beyond those of `TrainingSettings`.

    Where the router learns each expert's part from that expert's rows alone, a step has `batch_size` rows of every expert,
    and gradients are not clipped. `gradient_accumulation` None takes about `batch_size` rows at once. The number of passes
    changes the gradient of the loss only by the dropout between a router's own layers (`xlora` with depth above 1).
    `balance` times the balance loss is added to the loss: that loss is 1 where all E experts get equal weight, E where one
    gets all. `z` times the mean squared logsumexp of the scores, which keeps scores small, is added too. 0.01 and 0.001 are
    usual. `loss` "entropy" is the entropy of the predictions at the places of the targets, whatever the targets are: rows
    need no labels, only answers, such as the model's own.
    """

    balance: NonNegative = 0.0
    z: NonNegative = 0.0
    loss: Literal["targets", "entropy"] = "targets"

    def identity(self) -> dict[str, Any]:
        # checkpoints of versions without this setting are resumed too
        return {name: value for name, value in super().identity().items() if (name, value) != ("loss", "targets")}


def streams(rows: Sequence[TrainingRow], experts: Sequence[str], seed: int, *, apart: bool) -> list[Stream[TrainingRow]]:
    """Return one stream of all rows, or if `apart` one for each expert with rows, independent of other experts."""
    if not apart:
        return [Stream(rows, seed, "rows")]
    by_expert: dict[int, list[TrainingRow]] = {}
    for row in rows:
        by_expert.setdefault(row.expert, []).append(row)
    return [Stream(by_expert[place], seed, experts[place]) for place in sorted(by_expert)]


@dataclass(frozen=True)
class Pass:
    """The rows of one pass through the model.

    The step's loss is the sum over passes of sum over b and k of per_token_B * loss_BK, plus `share` times the pass's terms.
    `first` is the place of the pass's first row among the step's rows, whose order does not depend on the number of passes.
    """

    rows: Sequence[TrainingRow]
    per_token_B: Tensor
    share: float
    first: int


def passes(groups: Sequence[Sequence[TrainingRow]], num_passes: int) -> list[Pass]:
    """Return a step's passes, rows of similar length together; each group's loss is the mean over its target tokens."""
    weighted = []
    for group in groups:
        per_token = 1.0 / sum(row.num_targets for row in group)
        weighted += [(row, per_token) for row in group]
    # stable: equal lengths keep the order in which they were drawn
    weighted.sort(key=lambda pair: len(pair[0]))
    size = -(-len(weighted) // num_passes)
    starts = range(0, len(weighted), size)
    step_passes = []
    for start in starts:
        part = weighted[start : start + size]
        per_token_B = torch.tensor([share for _, share in part])
        step_passes.append(Pass([row for row, _ in part], per_token_B, 1 / len(starts), start))
    return step_passes


class RouterSteps:
    """The steps of one router's training, taken inside an activation of the router."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        router: LearnedRouter,
        settings: RouterSettings,
        rows: Sequence[TrainingRow],
        held: Sequence[TrainingRow],
        kept: KeptState,
        accelerator: Any,
        bar: Progress,
    ) -> None:
        self._model, self._tokenizer = model, NO_TOKENIZER if tokenizer is None else tokenizer
        self._router, self._settings, self._held = router, settings, held
        self._accelerator = accelerator
        self._processes = Processes.launched(next(model.parameters()).device)
        learning = [parameter for parameter in router.parameters() if parameter.requires_grad]
        self._taught = {row.expert for row in rows}
        self._progress = TrainingProgress(
            learning,
            settings,
            router.experts,
            kept,
            experts_of_layers=[layer.experts for layer in router.members.layers.values()],
            taught=self._taught,
            learner=f"router {router.name!r}",
            owner="router",
        )
        self._progress.show(bar, router.name)
        head = self._model.get_output_embeddings()
        self._head_is_routed = any(self._model.get_submodule(layer) is head for layer in router.layers)
        self._streams = streams(rows, router.experts, settings.seed, apart=router.apart)
        self._kept: dict[Any, Any] = {}

    def take_all(self) -> None:
        """Take the remaining steps; leave the router with the best parameters and its report."""
        progress = self._progress
        self._processes.require_alike("router", self._said(progress.first), progress.parameters)
        for number in range(progress.first + 1, self._settings.steps + 1):
            if number == 1:
                self._evaluate(0)
            self._step(number)
            progress.close(number, self._evaluate, mean=self._mean, saves=not self._processes.rank)
            if progress.stops:
                break
        self._router.report = progress.finish()

    def _said(self, first: int) -> str:
        """Return a text of the steps done, settings and rows, which must be equal in all processes."""
        rows = [row.identity() for stream in self._streams for row in stream.rows] if self._processes.count > 1 else []
        return repr([first, self._settings.identity(), rows, len(self._held)])

    def _step(self, number: int) -> None:
        """Take one step of the optimizer, down the mean loss over the step's target tokens."""
        settings, progress = self._settings, self._progress
        progress.optimizer.zero_grad()
        groups = [stream.at(number - 1, settings.batch_size) for stream in self._streams]
        parts = self._parts(groups)
        self._router.train()
        totals: dict[str, float] = {}
        for index, part in self._processes.share(list(enumerate(parts))):
            for name, value in self._pass(number, index, part).items():
                totals[name] = totals.get(name, 0.0) + value
        progress.report.tokens += sum(len(row) for part in parts for row in part.rows)
        summed = self._processes.sum(torch.tensor(list(totals.values()), dtype=torch.float64))
        totals = dict(zip(totals, summed.tolist(), strict=True))
        self._processes.sum_gradients(progress.parameters)
        loss = totals.pop("loss") / len(groups)
        norm = progress.judge(number, loss, totals)
        if number == 1:
            require_gradients(self._router, self._taught)
        if settings.clip is not None and not self._router.apart and norm > settings.clip:
            for parameter in progress.parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(settings.clip / norm)
        progress.good(number - 1)
        progress.descent.step(number - 1)

    def _parts(self, groups: Sequence[Sequence[TrainingRow]]) -> list[Pass]:
        """Return the passes of a step. Raises TrainingError if their number does not divide among the processes."""
        count, accumulation = self._processes.count, self._settings.gradient_accumulation
        parts = passes(groups, accumulation or -(-len(groups) // count) * count)
        if len(parts) % count:
            raise TrainingError(
                f"a step of {sum(map(len, groups))} rows in {len(parts)} passes does not divide among {count} launched "
                f"processes: take a batch_size, and a gradient_accumulation if any, that is a multiple of {count}"
            )
        return parts

    def _mean(self, seen: Tensor) -> Tensor:
        return (self._processes.sum(seen) / self._processes.count).cpu()

    def _pass(self, number: int, index: int, part: Pass) -> dict[str, float]:
        """Add the gradient of one pass; return its part of the step's loss and of each added term, by name."""
        inputs, decoder_BT = batch(self._model, self._tokenizer, part.rows), None
        if self._model.config.is_encoder_decoder:
            inputs = pad_apart(inputs)
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
        self._progress.watch.see(step)
        return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in terms.items()}}

    def _losses(self, number: int, inputs: TargetBatch) -> Tensor:
        """Return loss_BK of the target tokens. A head that is a routed layer gets all tokens, as the other layers do."""
        of = entropies_of if self._settings.loss == "entropy" else losses_of
        with self._progress.finite_weights(number):
            return of(target_logits(self._model, inputs, whole=self._head_is_routed), inputs.targets_BK)

    def _terms(self, step: Step) -> dict[str, Tensor]:
        """Return {name: added loss}: the router's own terms, and the balance and z losses times their coefficients."""
        terms = dict(self._router.losses(step))
        if self._settings.balance:
            terms["balance"] = self._settings.balance * balance_loss(step)
        if self._settings.z:
            terms["z"] = self._settings.z * z_loss(step)
        return terms

    @torch.no_grad()
    def _evaluate(self, number: int) -> None:
        """Note the mean loss over the held-out rows' target tokens, with the router in evaluation mode."""
        if not self._held:
            return
        self._router.eval()
        total, count = 0.0, 0
        ordered = sorted(self._held, key=len)
        # every process evaluates all rows: where the base is split over processes, each takes part in each call
        for start in range(0, len(ordered), self._settings.batch_size):
            inputs = batch(self._model, self._tokenizer, ordered[start : start + self._settings.batch_size])
            with self._accelerator.autocast():
                total += float(self._losses(number + 1, inputs).sum())
            count += int((inputs.targets_BK != IGNORED).sum())
        self._progress.note_evaluation(number, total / count)


def require_learning(router: Any) -> None:
    """Raise TrainingError, with the way out, for a router without parameters that this training could learn."""
    if isinstance(router, LearnedRouter):
        return
    name = getattr(router, "name", type(router).__name__)
    if any(isinstance(part, LearnedRouter) for part in getattr(router, "parts", ())):
        raise TrainingError(
            f"router {name!r} was made for another pool and put onto this one's experts: fit() it in an engine of its own "
            "pool, and put it onto() this one afterwards"
        )
    if callable(fit_method := getattr(type(router), "fit", None)) and fit_method is not TokenRouter.fit:
        raise TrainingError(f"router {name!r} has no parameters to train: call router.fit(engine, dataset)")
    raise TrainingError(f"{name!r} learns nothing, so there is nothing to fit: it can be activated as it is")


def fit(
    model: nn.Module,
    tokenizer: Any,
    activate: Callable[[LearnedRouter], AbstractContextManager[object]],
    router: LearnedRouter,
    dataset: Any,
    given: Mapping[str, Any],
) -> None:
    """Train `router` on a dataset with the settings `given`; `activate(router)` makes it live in the model.

    Raises the errors that `Composer.fit` lists.
    """
    settings = RouterSettings.of(router, given)
    learning = [name for name, parameter in router.named_parameters() if parameter.requires_grad]
    if not learning:
        raise TrainingError(f"no parameter of router {router.name!r} requires a gradient, so there is nothing to fit")
    reader = RowReader(Owners.of(router), model, tokenizer)
    rows = reader.read(dataset)
    held = [] if settings.evaluation is None else reader.read(settings.evaluation, what="evaluation", first=len(rows))
    # what is trained, as JSON
    trained = [{name: repr(value) for name, value in router.options.items()}, router.members.to_json(), learning]
    kept = KeptState.of(router.name, trained, settings, rows, held)
    device = next(model.parameters()).device
    router.to(device)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        accelerator = stack.enter_context(accelerator_for(device, settings.mixed_precision))
        bar = stack.enter_context(progress_bar(settings.progress and accelerator.is_main_process, field="seen"))
        stack.enter_context(activate(router))
        # around what the activation has put in: blocks that run again are watched again
        stack.enter_context(checkpointed_blocks(model, settings.gradient_checkpointing))
        try:
            RouterSteps(model, tokenizer, router, settings, rows, held, kept, accelerator, bar).take_all()
        finally:
            router.step = None
            router.eval()


def require_gradients(router: LearnedRouter, taught: Collection[int]) -> None:
    """Raise TrainingError that names the parameters which should have got a gradient in the first step and did not.

    `taught` are the places of the experts that the rows belong to. No gradient is due in a layer where a single expert's
    weight is 1 whatever the parameters are, nor in one whose experts learn only from their own rows and have no rows.
    """
    silent = [
        name
        for name, parameter in router.named_parameters()
        if parameter.requires_grad and not name.startswith(router.silent_at_first)
        if (parameter.grad is None or not parameter.grad.any()) and _promised(router, name, taught)
    ]
    if silent:
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        raise TrainingError(
            f"the first step gave no gradient to {len(silent)} parameters of router {router.name!r}: {shown}. Its weights "
            "must follow from them by operations that autograd knows; freeze what is not to learn (requires_grad_(False))"
        )


def _promised(router: LearnedRouter, name: str, taught: Collection[int]) -> bool:
    # the name that LayerTensors gives a layer's tensor
    layer = router.members.layers.get(name.rpartition(".")[2].replace("/", "."))
    if layer is None:
        return True
    if router.apart:
        return any(expert in taught for expert in layer.experts)
    return len(layer.experts) > 1 or not router.simplex


def balance_loss(step: Step) -> Tensor:
    """Return E * sum over e of f_e p_e, mean over layers (Fedus et al. 2021, arXiv 2101.03961, for weights of any top-k).

    p_e is the mean over the real tokens of softmax(scores), f_e that of the weights as shares, without a gradient; E counts
    the layer's own experts. The loss is 1 where all experts get equal shares, for every top-k, and E where one expert gets
    all.
    """
    losses = []
    for layer, scores_BTE in step.scores.items():
        scores_NE, w_NE = step.real(scores_BTE), step.real(step.weights[layer]).detach()
        total_N1 = w_NE.sum(dim=1, keepdim=True)
        # a token to which its layer gives nothing has no shares
        share_E = (w_NE / total_N1.where(total_N1 != 0, 1.0)).mean(dim=0)
        num_experts = int((scores_NE > -torch.inf).any(dim=0).sum())
        losses.append(num_experts * (share_E * scores_NE.softmax(dim=1).mean(dim=0)).sum())
    return torch.stack(losses).mean()


def z_loss(step: Step) -> Tensor:
    """Return the mean over real tokens and layers of logsumexp(scores)^2 (Zoph et al. 2022, arXiv 2202.08906)."""
    return torch.stack([z(step.real(scores_BTE)) for scores_BTE in step.scores.values()]).mean()


@contextmanager
def accelerator_for(device: torch.device, mixed_precision: str) -> Iterator[Any]:
    """Yield an Accelerator of this precision on that device; reset accelerate's process-wide state if this call created it.

    Raises TrainingError if the caller already made an Accelerator of another precision: a process can have only one.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    is_new = not is_initialized()
    try:
        try:
            accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
        except ValueError as error:
            raise TrainingError(
                f"mixed_precision={mixed_precision!r} does not fit the Accelerator that this process has already: {error}"
            ) from error
        yield accelerator
    finally:
        if is_new:
            AcceleratorState._reset_state(reset_partial_state=True)
