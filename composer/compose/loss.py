"""The loss of mixtures on a few examples: whole populations of candidates in one forward pass, a mixture per row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from loraweave.common.chat import Prompt, prompt_json
from loraweave.common.options import NonNegative, check_options, options_of
from loraweave.composer.compose.examples import EncodedExamples, Examples
from loraweave.composer.compose.objectives._row_sums import Kind, RowSums
from loraweave.composer.compose.population import (
    Job,
    active_candidate,
    can_be_factor_sums,
    factor_sums,
    forward_sums,
    in_passes,
    joined,
    row_sums,
    task_values,
)
from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import in_chunks, untouched
from loraweave.composer.model.scoring import generate
from loraweave.errors import InvalidTask, WeightingError, WorkersFailed
from loraweave.hub.base import fingerprint
from loraweave.registry import get
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

Candidates = Sequence[MixtureWeights]
# factor sums that are made at a time, since each has as many bytes as an adapter
MAX_CANDIDATES = 16
Piece = TypeVar("Piece")
Made = TypeVar("Made")


def together(views: Sequence[ExampleLoss], candidates: Sequence[Candidates]) -> list[list[float]]:
    """Return the losses that each view of one objective gives its own candidates; all views share forward passes."""
    return [[loss for loss, _ in scored] for scored in _scored(views, candidates, _losses)]


def together_with_gradients(
    views: Sequence[ExampleLoss], candidates: Sequence[Candidates]
) -> list[tuple[list[float], list[Tensor]]]:
    """Return the losses and gradients that each view of one objective gives its own candidates, from shared passes.

    A failed candidate has the loss NaN and a gradient of NaN.
    """
    first = views[0]
    if not first.differentiable:
        kind = "a function" if first.function is not None else type(first.kind).__name__
        raise WeightingError(
            f"no gradients of objective {kind} with merge method {first.merge_method!r}: use 'cross_entropy', 'labels' or "
            "'entropy' with 'linear', or a solver that needs none"
        )
    told = []
    for scored, mixtures in zip(_scored(views, candidates, _slopes), candidates, strict=True):
        gradients = [
            torch.full_like(mixture.values_BTLE, math.nan) if gradient is None else gradient
            for (_, gradient), mixture in zip(scored, mixtures, strict=True)
        ]
        told.append(([loss for loss, _ in scored], gradients))
    return told


# longer answers tell little more of how sure a model is
MAX_NEW_TOKENS = 16
# stands for an empty answer, so that the prediction of its first token counts
NOTHING = "."


def with_own_answers(engine: Composer, tokenizer: Any, task: Task, inputs: Sequence[Prompt]) -> Task:
    """Return the task with these inputs as its examples, for a loss that looks at no target.

    In a task with labels every input has the first label as its target. Otherwise the targets are the answers, of at most 16
    tokens, that greedy decoding writes under the uniform mixture of the pool; "." for an empty answer. Raises
    InvalidTask where there are no inputs.
    """
    if not inputs or isinstance(inputs, str):
        raise InvalidTask(f"inputs are {inputs!r}; give a list of at least one text")
    if task.labels:
        return replace(task, examples=[(text, task.labels[0]) for text in inputs])
    names = engine.pool.names
    with untouched(engine.model), engine.activate(dict.fromkeys(names, 1 / len(names))):
        prompts = [task.prompt(text) for text in inputs]
        answers = generate(engine.model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, stop=task.stops)
    return replace(task, examples=[(text, answer or NOTHING) for text, answer in zip(inputs, answers, strict=True)])


@dataclass
class Failures:
    """The number of candidates that could not be scored, and why the first one could not."""

    count: int = 0
    first: str = ""

    def add(self, why: str) -> None:
        """Count one more failed candidate, and keep the reason of the first."""
        self.count += 1
        self.first = self.first or why


# `sparsity` does not count an expert whose weights are all of this size or smaller
COUNTED = 0.01


@dataclass(frozen=True)
class Penalty:
    """The terms l1 * mean|w| + l2 * mean(w^2) + sparsity * (number of experts with a weight above 0.01 in some layer).

    The means are over experts and, where weights differ by layer, layers. The count takes no part in gradients.
    By default `l1` is LoraHub's published one. Raises WeightingError for factors that are negative or not finite.
    """

    l1: NonNegative = 0.05
    l2: NonNegative = 0.0
    sparsity: NonNegative = 0.0

    def __post_init__(self) -> None:
        check_options("the loss", asdict(self), options_of(Penalty), noun="term")

    def __call__(self, values_BTLE: Tensor) -> Tensor:
        """Return the sum of the terms, a scalar of the weights' dtype."""
        total = torch.zeros((), dtype=values_BTLE.dtype)
        if self.l1:
            total = total + self.l1 * values_BTLE.abs().mean()
        if self.l2:
            total = total + self.l2 * values_BTLE.square().mean()
        if self.sparsity:
            counted_E = (values_BTLE.detach().abs() > COUNTED).flatten(0, 2).any(dim=0)
            total = total + self.sparsity * counted_E.sum().to(values_BTLE.dtype)
        return total


class ExampleLoss:
    """An objective: the mean over a task's examples of a kind of loss, and terms for the weights alone.

    `kind` is a name of `names("objectives")`, by default the mean loss of the target's tokens, or a function of (model,
    examples) that returns a number, lower is better: the model answers for the candidate, in evaluation mode and without
    gradients, and examples are (input, target) pairs, an input of several turns being a `Conversation`. `terms` are those of
    `Penalty`: l1, by default LoraHub's published 0.05, l2 and sparsity. `merge_method` says what weights mean: "linear" is
    the sum of deltas, run live with one mixture a row; any other name is merged and written into the base for each
    candidate. `inputs`, for "entropy" alone, are texts without targets that take the place of the task's examples. With
    `turned`, an example that the prompts show has the prompt that `in_turn` gives it, which costs less than showing all the
    others. Several forward passes are dealt out to the `workers`; a function, which may close over anything, is called in
    this process.

    A candidate that raises an error, or whose loss is not finite, has the loss NaN; `failures` counts these. Raises
    UnknownName for an unknown kind, InvalidTask for examples that the kind cannot score and for a function with `inputs`,
    WeightingError for terms that cannot be used.
    """

    def __init__(
        self,
        engine: Composer,
        tokenizer: Any,
        task: Task,
        *,
        kind: str | Callable[[Any, Examples], float] = "cross_entropy",
        merge_method: str = "linear",
        inputs: Sequence[Prompt] | None = None,
        turned: bool = False,
        workers: Any = None,
        **terms: float,
    ) -> None:
        if inputs is not None and kind != "entropy":
            raise InvalidTask(
                "a function as the objective is called with the task's examples; inputs are for 'entropy'"
                if callable(kind)
                else f"objective {kind!r} needs targets; inputs without them are for 'entropy'"
            )
        self.engine, self.merge_method, self.penalty = engine, merge_method, Penalty(**terms)
        self.task = task if inputs is None else with_own_answers(engine, tokenizer, task, inputs)
        # the indices of the examples that count; they differ between views
        self.only = tuple(range(len(self.task.examples)))
        self.failures = Failures()
        self.function = kind if callable(kind) else None
        self._deal: Callable[..., list[Any]] | None = None
        if not callable(kind):
            self.kind: Kind = get("objectives", kind)(self.task)
            # invocation tokens are looked for in one text, and in a tree a token may have several before it
            trees = engine.pool.lazy or not engine.pool.invocations()
            self.encoded = EncodedExamples(engine.model, tokenizer, self.task, self.kind, trees=trees, turned=turned)
            if workers is not None:
                made = partial(ExampleLoss, task=self.task, kind=kind, merge_method=merge_method, turned=turned)
                self._deal = workers.dealing(made)

    def view(self, only: Sequence[int]) -> Self:
        """Return the same objective on the task's examples with these indices, counting failures of its own.

        Views share what the objective has prepared.
        """
        view = self.penalised(self.penalty)
        view.only = tuple(only)
        return view

    def penalised(self, penalty: Penalty) -> Self:
        """Return the same objective with these terms for the weights."""
        objective = copy.copy(self)
        objective.failures = Failures()
        objective.penalty = penalty
        return objective

    def describe(self) -> dict[str, Any]:
        """Return all that the losses depend on, for JSON: kind, tokens, base, experts, merge method and penalty.

        A function is described by its name, and by the examples as texts. The experts of a lazy pool are opened.
        """
        if self.function is None:
            judge: dict[str, Any] = {"kind": type(self.kind).__name__, "tokens": self.encoded.digest(self.only)}
        else:
            judge = {
                "function": getattr(self.function, "__qualname__", type(self.function).__name__),
                "instruction": self.task.instruction,
                "examples": [[prompt_json(prompt), target] for prompt, target in self.shown()],
            }
        return {
            **judge,
            "base": fingerprint(self.engine.model).to_json(),
            "dtype": str(next(self.engine.model.parameters()).dtype),
            "experts": {name: adapter.hash for name, adapter in self.engine.pool.adapters.items()},
            "merge_method": self.merge_method,
            "penalty": asdict(self.penalty),
        }

    @property
    def differentiable(self) -> bool:
        """True if the objective has gradients."""
        return self.function is None and self.kind.differentiable and self.merge_method == "linear"

    def __call__(self, candidates: Sequence[MixtureWeights]) -> list[float]:
        return together([self], [candidates])[0]

    def deal(self, work: Callable[[ExampleLoss, Piece], Made], pieces: Sequence[Piece]) -> list[Made]:
        """Return work(self, piece) of each piece; several go to the workers. Raises the error of the first that fails."""
        if self._deal is None or len(pieces) == 1:
            return [work(self, piece) for piece in pieces]
        return self._deal(work, pieces)

    def gradients(self, candidates: Sequence[MixtureWeights]) -> tuple[list[float], list[Tensor]]:
        """Return the loss of each candidate, and d loss / d values_BTLE, of the shape of its values; NaN for a failed one.

        Several candidates share a forward and a backward pass. The products run in the model's dtype, the weights and
        their gradients have fp32 or better. |w| has the slope 0 at 0, and the count of experts has none.
        Raises WeightingError where there are no gradients: for functions, for a count of misses, and for merges other than
        the sum.
        """
        return together_with_gradients([self], [candidates])[0]

    def scores(self, candidates: Sequence[MixtureWeights]) -> tuple[np.ndarray, np.ndarray]:
        """Return (loss_CN, hit_CN) of every candidate on every example, without the terms for its weights.

        A hit is an example that the model would answer with its target: in greedy decoding, or among the labels.
        """
        sums = _sums([(self, candidate) for candidate in candidates], self.kind.needs | self.kind.hit_needs)
        losses = [self.kind.losses(pair_sums).double().numpy() for pair_sums in sums]
        hits = [self.kind.hits(pair_sums).numpy() for pair_sums in sums]
        return np.stack(losses), np.stack(hits)

    def scores_on(self, candidate: MixtureWeights, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return (loss_N, hit_N) of one candidate on these examples, by index among all of the task's."""
        losses_CN, hits_CN = self.view(examples).scores([candidate])
        return losses_CN[0], hits_CN[0]

    def term(self, values_BTLE: Tensor) -> tuple[float, Tensor]:
        """Return the terms for the weights alone, and their gradient; in fp32 or better."""
        with torch.inference_mode(False), torch.enable_grad():
            values = values_BTLE.detach().clone().to(torch.promote_types(values_BTLE.dtype, torch.float32)).requires_grad_()
            term = self.penalty(values)
            (gradient,) = torch.autograd.grad(term, values) if term.requires_grad else (torch.zeros_like(values),)
        return float(term.detach()), gradient.detach()

    def shown(self) -> Examples:
        """Return the (input, target) pairs with which an objective that is a function is called."""
        return [self.task.examples[index] for index in self.only]


Pairs = Sequence[tuple[ExampleLoss, MixtureWeights]]
# the loss of a candidate and, where gradients are computed, its gradient
Scored = tuple[float, Tensor | None]


def _scored(
    views: Sequence[ExampleLoss], candidates: Sequence[Candidates], evaluate: Callable[[Pairs], list[Scored]]
) -> list[list[Scored]]:
    """Return the losses and gradients that `evaluate` computes for each view's own candidates; NaN for a failed candidate.

    All candidates run together, unless the objective is a function, which is called for one candidate after the other.
    """
    pairs = [(view, mixture) for view, mixtures in zip(views, candidates, strict=True) for mixture in mixtures]
    parts = [pairs]
    if views[0].function is None:
        # examples that cannot be read are no candidate's fault
        views[0].encoded.prepare()
    else:
        parts = [[pair] for pair in pairs]
    in_order = chain.from_iterable([_contain_failures(part, evaluate) for part in parts])
    return [list(islice(in_order, len(mixtures))) for mixtures in candidates]


def _contain_failures(pairs: Pairs, evaluate: Callable[[Pairs], list[Scored]]) -> list[Scored]:
    """Return the results of `evaluate`; if it raises, find the pairs at fault by halving, and give them the loss NaN."""
    try:
        results = evaluate(pairs) if pairs else []
    # no candidate is at fault
    except WorkersFailed:
        raise
    # an interruption is no Exception, and ends the search
    except Exception as error:
        if len(pairs) == 1:
            pairs[0][0].failures.add(f"{type(error).__name__}: {error}")
            return [(math.nan, None)]
        half = len(pairs) // 2
        return _contain_failures(pairs[:half], evaluate) + _contain_failures(pairs[half:], evaluate)
    for number, ((objective, _), (loss, gradient)) in enumerate(zip(pairs, results, strict=True)):
        if not math.isfinite(loss):
            objective.failures.add(f"its loss is {loss}")
            results[number] = math.nan, None
        elif gradient is not None and not gradient.isfinite().all():
            objective.failures.add("its gradient is not finite")
            results[number] = math.nan, None
    return results


def _losses(pairs: Pairs) -> list[Scored]:
    first, mixture = pairs[0]
    if first.function is not None:
        with untouched(first.engine.model), torch.no_grad(), active_candidate(first.engine, mixture, first.merge_method):
            loss = float(first.function(first.engine.model, first.shown()))
        return [(loss + float(first.penalty(mixture.values_BTLE)), None)]
    results: list[Scored] = []
    for (objective, mixture), sums in zip(pairs, _sums(pairs, first.kind.needs), strict=True):
        loss_N, term = objective.kind.losses(sums).double(), objective.penalty(mixture.values_BTLE).double()
        results.append((float(loss_N.mean() + term), None))
    return results


def _sums(pairs: Pairs, needs: frozenset[str]) -> list[RowSums]:
    """Return each pair's sums; sums of updates or factors share passes, any other merge is written into the base alone."""
    first, _ = pairs[0]
    jobs = [Job(mixture, objective.only, objective.only) for objective, mixture in pairs]
    if first.merge_method == "linear":
        passes, counts = in_passes(first.encoded, jobs)
        return joined(first.deal(partial(_live_sums, needs), passes), counts)
    first.encoded.prepare()
    if first.merge_method == "factor_sum" and can_be_factor_sums(first.engine.bound_pool, [mixture for _, mixture in pairs]):
        return list(chain.from_iterable(first.deal(partial(_summed, needs), in_chunks(jobs, MAX_CANDIDATES))))
    return first.deal(partial(_written, needs), jobs)


def _live_sums(needs: frozenset[str], on: ExampleLoss, part: Sequence[Job]) -> list[RowSums]:
    with untouched(on.engine.model), torch.no_grad():
        return forward_sums(on.engine, on.encoded, part, needs)


def _written(needs: frozenset[str], on: ExampleLoss, job: Job) -> RowSums:
    assert job.mixture is not None
    with active_candidate(on.engine, job.mixture, on.merge_method):
        (sums,) = row_sums(on.engine, on.encoded, [replace(job, mixture=None)], needs)
    return sums


def _summed(needs: frozenset[str], on: ExampleLoss, part: Sequence[Job]) -> list[RowSums]:
    """Return the sums of jobs whose candidates are sums of factors; each becomes an expert, so that all share passes."""
    engine = factor_sums(on.engine, [job.mixture for job in part if job.mixture is not None])
    rows = torch.eye(len(part))[:, None, None, None]
    jobs = [replace(job, mixture=MixtureWeights(row, engine.pool.names)) for row, job in zip(rows, part, strict=True)]
    return row_sums(engine, on.encoded, jobs, needs)


def _slopes(pairs: Pairs) -> list[Scored]:
    first, _ = pairs[0]
    jobs = [Job(mixture, objective.only, objective.only) for objective, mixture in pairs]
    passes, counts = in_passes(first.encoded, jobs, backward=True)
    shares: list[tuple[float, Tensor]] = []
    for losses, slopes in first.deal(_live_slopes, passes):
        shares += zip(losses, slopes, strict=True)
    in_order, results = iter(shares), list[Scored]()
    for (objective, mixture), count in zip(pairs, counts, strict=True):
        loss, gradient = objective.term(mixture.values_BTLE)
        for share, slope in islice(in_order, count):
            loss, gradient = loss + share, gradient + slope[None]
        results.append((loss, gradient))
    return results


def _live_slopes(on: ExampleLoss, jobs: Sequence[Job]) -> tuple[list[float], Tensor]:
    """Return the share of each of C jobs in its loss, and the gradients of these shares by values_CTLE, in fp32 or better.

    A share is the sum over a job's examples, divided by the number of examples of the whole job.
    """
    # below a caller's inference_mode, tensors would take no part in a backward pass
    with untouched(on.engine.model), torch.inference_mode(False), torch.enable_grad():
        values_CTLE = task_values(jobs).detach().clone()
        values_CTLE = values_CTLE.to(torch.promote_types(values_CTLE.dtype, torch.float32)).requires_grad_()
        sums = forward_sums(on.engine, on.encoded, jobs, on.kind.needs, values_CTLE)
        loss_C = torch.stack(
            [on.kind.losses(job_sums).double().sum() / len(job.whole) for job_sums, job in zip(sums, jobs, strict=True)]
        )
        (slopes_CTLE,) = torch.autograd.grad(loss_C.sum(), values_CTLE)
    return loss_C.detach().tolist(), slopes_CTLE
