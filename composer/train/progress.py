"""A running training: its processes, its steps, its report, and the best and the last good values of its parameters."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, noop_context_fn

from loraweave.common.descent import Descent, TrainingState, checkpoint_folder, load_state, save_state, warmed_cosine
from loraweave.common.names import text_digest
from loraweave.common.options import Count, NonNegative, Positive, Range, Whole, check_options, options_of
from loraweave.composer.train.state import Best, copy_values, put_values
from loraweave.errors import TrainingError, WeightingError
from loraweave.routers.tokens._learned import Step, TrainingReport
from loraweave.routers.weights import LARGEST

# AdamW divides its first step by 1 - beta1
FIRST_STEP = 10


class Learner(Protocol):
    """A learner with a default learning rate, `lr`."""

    lr: ClassVar[float]


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training by AdamW, over `steps` steps of `batch_size` rows each.

    `lr`, by default the learner's own, is reached after `warmup` steps (at most half of all) and falls to 0 as half a
    cosine. A gradient whose norm exceeds `clip` is scaled to that norm; None sets no limit. `gradient_accumulation` splits a
    step's rows into as many passes: less memory, the same gradient of the loss; added terms are the mean over the passes.
    `gradient_checkpointing` runs the model's blocks a second time in the backward pass instead of keeping their activations.
    `mixed_precision` "bf16" computes the model's products in bfloat16; parameters and loss keep their dtype. `evaluation` is
    a dataset whose loss is measured before the first step, after every `evaluate_every` steps and after the last; the
    parameters with the lowest loss are kept. With `patience`, the training ends after that many evaluations in a row without
    a lower loss. `checkpoint` is a folder: every `checkpoint_every` steps the state is saved there, and the same call
    resumes where it was interrupted, to the same bits.
    """

    steps: Count = 100
    lr: Positive | None = None
    batch_size: Count = 8
    # the range of numpy's seeds
    seed: Annotated[int, Range(least=0, below=2**32)] = 0
    warmup: Whole = 10
    weight_decay: NonNegative = 0.0
    clip: Positive | None = 1.0
    gradient_accumulation: Count | None = None
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    evaluation: Mapping[str, Any] | Iterable[Any] | None = None
    evaluate_every: Count = 20
    patience: Count | None = None
    checkpoint: str | Path | None = None
    checkpoint_every: Count = 20
    progress: bool = True

    # settings that the result does not depend on, or that the caller adds to the identity itself
    aside: ClassVar[tuple[str, ...]] = ("evaluation", "checkpoint", "checkpoint_every", "progress")

    @classmethod
    def of(cls, learner: Learner, given: Mapping[str, Any]) -> Self:
        """Return the settings of a call of fit(). Raises TrainingError for unknown ones and for values out of range."""
        check_options("fit()", given, options_of(cls), noun="setting", error=TrainingError)
        settings = cls(**given)
        settings = replace(settings, lr=learner.lr if settings.lr is None else settings.lr)
        settings._require_sense()
        return settings

    def identity(self) -> dict[str, Any]:
        """Return the settings that the result depends on, as JSON, without the held-out rows, which the caller adds."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.aside}

    @property
    def highest_rate(self) -> float:
        assert self.lr is not None
        return self.lr

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return warmed_cosine(self.highest_rate, step, self.steps, min(self.warmup, self.steps // 2))

    def _require_sense(self) -> None:
        """Raise TrainingError for settings that contradict each other, and for rates that overflow fp32."""
        if self.patience is not None and self.evaluation is None:
            raise TrainingError("patience counts evaluations, but there is no evaluation: pass evaluation=rows held out")
        if self.highest_rate * max(FIRST_STEP, self.weight_decay) > LARGEST:
            raise TrainingError(
                f"lr is {self.lr!r} and weight_decay {self.weight_decay!r}: AdamW's steps would be beyond {LARGEST:.1e}, "
                "the largest number of fp32; rates are usually below 1"
            )


BEST, RECENT, MOVED = "best", "recent", "moved"


@dataclass(frozen=True)
class KeptState:
    """The place of a training's checkpoint: in `folder`, if any, under a key of everything that determines the result."""

    folder: Path | None
    key: str

    @classmethod
    def of(
        cls, name: str, identity: Sequence[Any], settings: TrainingSettings, rows: Sequence[Any], held: Sequence[Any]
    ) -> Self:
        """Return the place of a training's checkpoint; `identity` describes the trained parameters, as JSON.

        Raises TrainingError if the folder cannot be made.
        """
        if settings.checkpoint is None:
            return cls(None, "")
        folder = checkpoint_folder(settings.checkpoint)
        data = [[row.identity() for row in part] for part in (rows, held)]
        parts = [name, *identity, settings.identity(), data]
        digest = text_digest(json.dumps(parts, sort_keys=True))
        return cls(folder, f"{name}-{digest[:24]}")

    def save(
        self,
        step: int,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        best: Sequence[Tensor],
        recent: Sequence[Tensor],
        report: TrainingReport,
        moved: Sequence[Tensor] = (),
    ) -> None:
        """Save the state in one atomic write. A full disk is logged and does not end the training."""
        if self.folder is None:
            return
        tensors = TrainingState.of(step, parameters, optimizer).tensors
        for part, values in ((BEST, best), (RECENT, recent), (MOVED, moved)):
            tensors |= {f"{index}.{part}": value.detach() for index, value in enumerate(values)}
        save_state(self.folder, self.key, TrainingState(step, tensors, report.to_json()))

    def restore(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, moved: Sequence[Tensor] = ()
    ) -> tuple[int, list[Tensor], list[Tensor], TrainingReport] | None:
        """Restore the state; return (steps done, best parameters, recent loads, report), or None without a state."""
        state = None if self.folder is None else load_state(self.folder, self.key)
        if state is None:
            return None
        step = state.restore(parameters, optimizer)
        put_values(_numbered(state, MOVED), moved)
        return step, _numbered(state, BEST), _numbered(state, RECENT), TrainingReport.from_json(state.about)


def _numbered(state: TrainingState, part: str) -> list[Tensor]:
    names = (name for name in state.tensors if name.endswith(f".{part}"))
    return [state.tensors[name] for name in sorted(names, key=lambda name: int(name.partition(".")[0]))]


class TrainingProgress:
    """The progress of a router's or an expert model's training, whether our loop or a transformers Trainer takes the steps.

    The progress resumes from the checkpoint in `state`, whose number of steps is `first`. Call `judge` when a step's
    gradients are there, and `close` when the optimizer has taken the step. `moved` are parameters that steps change without
    a gradient. `experts_of_layers` and `taught` are those of `Watch`. `learner` ("router 'arrow'") and `owner` ("router"),
    which has the parameters, are for messages.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        settings: TrainingSettings,
        experts: tuple[str, ...],
        state: KeptState,
        *,
        experts_of_layers: Iterable[Sequence[int]],
        taught: Collection[int],
        learner: str,
        owner: str,
        moved: Sequence[Tensor] = (),
    ) -> None:
        self.parameters, self._moved = parameters, moved
        self.descent = Descent(parameters, settings.rate, limit=None, weight_decay=settings.weight_decay)
        self.optimizer = self.descent.optimizer
        self.report = TrainingReport(experts, settings=settings.identity())
        self.first = 0
        self._settings, self._state = settings, state
        self._learner, self._owner = learner, owner
        self._bar: Progress | None = None
        self._started = time.monotonic()
        self._best = Best()
        recent: Sequence[Tensor] = ()
        if (restored := state.restore(parameters, self.optimizer, moved)) is not None:
            self.first, values, recent, self.report = restored
            self._best = Best.again([loss for _, loss in self.report.evaluations], values)
        self.watch = Watch(experts_of_layers, self.report, settings.steps, sorted(taught))
        self.watch.recent.extend(recent)
        self._before = self.report.seconds
        # the number of steps after which the loss was last finite, and the parameters then
        self._good_step, self._good = self.first, copy_values(self._values_now())

    def show(self, bar: Progress, name: str) -> None:
        """Set the progress bar that shows the following steps, and the learner's name in it."""
        self._bar = bar
        self._shown = bar.add_task(f"fit {name}", total=self._settings.steps, completed=self.first, seen="")

    def judge(self, number: int, loss: float, terms: Mapping[str, float]) -> float:
        """Return the norm of the step's gradient, after giving a zero gradient to each parameter without one.

        Raises TrainingError, with the last good parameters put back, for a loss, term or norm that is not finite.
        """
        self.require_finite(number, {"the loss": loss, **{f"term {name!r}": value for name, value in terms.items()}})
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self.require_finite(number, {"the length of the gradient": norm})
        self._values = loss, terms
        return norm

    def close(
        self,
        number: int,
        evaluate: Callable[[int], None],
        *,
        mean: Callable[[Tensor], Tensor] = lambda seen: seen,
        seen: str = "",
        saves: bool = True,
    ) -> None:
        """Close the step that was judged last: report, evaluate if it is time, update the bar, and save the state.

        `mean` averages a tensor over processes, `seen` is text for the bar, and `saves` is True in the one process that
        saves.
        """
        loss, terms = self._values
        self.report.losses.append(loss)
        for name, value in terms.items():
            self.report.terms.setdefault(name, []).append(value)
        seen = self.watch.end_step(number, mean=mean) + seen
        last = number == self._settings.steps
        if number % self._settings.evaluate_every == 0 or last:
            evaluate(number)
        self.report.seconds = self._before + time.monotonic() - self._started
        if self._bar is not None:
            held_out = f"  held out {self.report.evaluations[-1][1]:.3f}" if self.report.evaluations else ""
            total = number if self.stops else self._settings.steps
            self._bar.update(self._shown, advance=1, total=total, seen=f"loss {loss:.3f}{held_out}{seen}")
        if saves and (number % self._settings.checkpoint_every == 0 or last or self.stops):
            recent = list(self.watch.recent)
            best = self._best.values
            self._state.save(number, self.parameters, self.optimizer, best, recent, self.report, self._moved)

    def require_finite(self, number: int, values: Mapping[str, float]) -> None:
        """Raise TrainingError, with the last good parameters put back, for a value of this step that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(f"{name} is {value} {self._ended(number)}")

    @contextmanager
    def finite_weights(self, number: int) -> Iterator[None]:
        """Raise TrainingError, with the last good parameters put back, if the code inside raises WeightingError."""
        try:
            yield
        except WeightingError as error:
            raise TrainingError(f"{error}. It was {self._ended(number)}") from error

    def _ended(self, number: int) -> str:
        """Put the last good parameters back; return the end of an error message: step, remedy, and what was put back."""
        return (
            f"at step {number} of {self._learner}: lower lr, or look for damaged rows. {self.put_back()}, with which it was "
            "last finite"
        )

    def good(self, step: int) -> None:
        """Note the present parameters as those after `step` steps, to put back if a later value is not finite."""
        if self._good[0].device == self.parameters[0].device:
            # memory that is there already costs less than new memory in every step
            put_values(self._values_now(), self._good)
        else:
            # a Trainer of several processes has moved them since the beginning
            self._good = copy_values(self._values_now())
        self._good_step = step

    def put_back(self) -> str:
        """Give the parameters their last good values; return a sentence that says so."""
        put_values(self._good, self._values_now())
        return f"The {self._owner} has the parameters after {self._good_step} steps"

    def note_evaluation(self, step: int, loss: float) -> None:
        """Note the held-out loss of the parameters after `step` steps. Raises TrainingError if it is not finite."""
        self.require_finite(step + 1, {"the loss of the rows held out": loss})
        self.report.evaluations.append((step, loss))
        if self._best.judge(loss, self._values_now()):
            self.report.kept = step

    def _values_now(self) -> list[Tensor]:
        """Return the tensors that steps change: the parameters, and those moved without a gradient."""
        return [*self.parameters, *self._moved]

    @property
    def stops(self) -> bool:
        """True if the training ends early: `patience` evaluations in a row brought no lower loss."""
        return self._settings.patience is not None and self._best.waited >= self._settings.patience

    def finish(self) -> dict[str, Any]:
        """Give the parameters their best values; return the report as JSON."""
        if self._best.values:
            put_values(self._best.values, self._values_now())
        else:
            self.report.kept = len(self.report.losses)
        return self.report.to_json()


WINDOW = 20
COLLAPSED = 0.95
# an expert with less than this part of an equal share is dead
DEAD = 0.01
# steps whose load is kept in the report
POINTS = 100


class Watch:
    """A monitor of the gates' weights in each step, which writes experts' loads and entropies into the report."""

    def __init__(
        self, experts_of_layers: Iterable[Sequence[int]], report: TrainingReport, steps: int, taught: Sequence[int]
    ) -> None:
        """Store the shares of load that equal use would give, from each layer's experts; `taught` experts own rows."""
        self._report = report
        self._every = max(1, steps // POINTS)
        # rows of one expert alone are rightly all its own
        self._one_taught = len(set(taught)) == 1 and -1 not in taught
        present = torch.zeros(len(report.experts), dtype=torch.float64)
        for experts in experts_of_layers:
            present[list(experts)] += 1 / len(experts)
        # share_E of experts that are used alike wherever they are present
        self._equal_E = present / present.sum()
        # load_E of the last steps
        self.recent: deque[Tensor] = deque(maxlen=WINDOW)
        self._loads: list[Tensor] = []
        self._entropies: list[float] = []

    def see(self, step: Step) -> None:
        """Record the weights of one forward pass of the running step."""
        num_experts = len(self._report.experts)
        seen = [_of_layer(step.real(w_BTE.detach()), num_experts) for w_BTE in step.weights.values()]
        if seen:
            loads, entropies = zip(*seen, strict=True)
            self._loads.append(torch.stack(loads).mean(dim=0).double().cpu())
            self._entropies.append(float(torch.stack(entropies).mean()))

    def end_step(self, number: int, *, mean: Callable[[Tensor], Tensor] = lambda seen: seen) -> str:
        """End step `number`; return a text of its loads for the bar. Warns, once, when one expert has almost all weight.

        `mean` averages this process's loads and entropy over all processes.
        """
        if not self._loads:
            return ""
        seen = mean(torch.cat([torch.stack(self._loads).mean(dim=0), torch.tensor(self._entropies).double().mean()[None]]))
        load_E, entropy = seen[:-1], float(seen[-1])
        self._loads.clear()
        self._entropies.clear()
        self.recent.append(load_E)
        report = self._report
        report.entropy.append(entropy)
        if number % self._every == 0 or number == 1:
            report.load.append((number, [round(share, 4) for share in load_E.tolist()]))
        if len(self.recent) == WINDOW:
            self._judge(number, torch.stack(list(self.recent)).mean(dim=0))
        top = int(load_E.argmax())
        dead = f"  dead {len(report.dead)}" if report.dead else ""
        return f"  entropy {entropy:.2f}  top {report.experts[top]} {float(load_E[top]):.0%}{dead}"

    def _judge(self, number: int, mean_E: Tensor) -> None:
        report = self._report
        report.dead = [
            name for name, dead in zip(report.experts, (mean_E < DEAD * self._equal_E).tolist(), strict=True) if dead
        ]
        top = int(mean_E.argmax())
        if len(mean_E) > 1 and report.collapsed is None and not self._one_taught and float(mean_E[top]) > COLLAPSED:
            report.collapsed = number
            warnings.warn(
                f"the router has collapsed: over the last {WINDOW} steps expert {report.experts[top]!r} had "
                f"{float(mean_E[top]):.0%} of all weight; a balance loss (balance=0.01) or a lower lr keeps others in use",
                stacklevel=6,
            )


def _of_layer(w_NE: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return (load_E, entropy) of a layer's weights, each token's normalised to shares; both are means over the tokens.

    The layer may have fewer experts than `num_experts`, the first ones.
    """
    w_NE = functional.pad(w_NE.abs().float(), (0, num_experts - w_NE.shape[1]))
    share_NE = w_NE / w_NE.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return share_NE.mean(dim=0), torch.special.entr(share_NE).sum(dim=1).mean()


# around a block's forward, and around its second run
Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


@contextmanager
def checkpointed_blocks(
    model: nn.Module, wanted: bool, *, context_fn: Callable[[], Contexts] = noop_context_fn
) -> Iterator[None]:
    """Make each block keep only its inputs and run again in the backward pass, in evaluation mode too, within the context.

    Leaving restores the model. `context_fn` is that of `torch.utils.checkpoint`, called whenever a block runs. Raises
    TrainingError for a model without such blocks.
    """
    # its import brings torch's compiler with it
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    if wanted and not blocks:
        raise TrainingError(f"{type(model).__name__} has no blocks to run again: leave gradient_checkpointing out")
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=context_fn)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward
