"""The order of a search's candidates by their effect on a few examples, measured with the model.

The slopes of a whole pool come from one backward pass. At any mixture d loss / d w_e = sum over layers of <G, B_e A_e>,
with G the loss's gradient by the layer's weight. G is a sum over tokens of g x^T, so that the product is the sum over tokens
of (A_e x) . (B_e^T g): the factors meet the layer's input and the gradient at its output, and neither G nor an update is
ever formed. Gain and bias meet sum g * y0 and sum g.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import (
    Adapter,
    Candidate,
    Composer,
    CompositionError,
    ExpertPool,
    Hub,
    InvalidTask,
    MixtureWeights,
    SearchFailed,
    Task,
    UnknownName,
    WeightingError,
)
from loraweave.extend import Count, GivenRows, TargetLayer, check_options, nearest, progress_bar, require_all, spread
from loraweave.extend.composing import experts_of
from loraweave.extend.hubs import StackedFactors, require_everywhere
from loraweave.extend.models import GradientTap, base_loader, linear
from loraweave.extend.scoring import ExampleLoss, batch, encode_pairs, in_chunks, mean_losses, untouched

# score (higher is better) and evidence of every expert
_Ranking = dict[str, tuple[float, str]]

WAYS = ("first_order", "probe")
# the number of candidates in one piece of work
PIECE = 64


def rerank(
    model: Any,
    tokenizer: Any,
    hub_or_pool: Hub | ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    task: Task | GivenRows,
    candidates: Sequence[Candidate],
    *,
    by: str = "first_order",
    weight: float = 1.0,
    batch_size: int = 8,
    n_jobs: int | None = None,
    progress: bool = True,
) -> list[Candidate]:
    """Return the candidates, best first by their effect on the task's examples, which their score and evidence state.

    `by`: "first_order" scores by how much the loss would fall by `weight` more of the adapter if it kept its slope at the
    uniform mixture of the candidates, whose weights sum to `weight` (one backward pass for all of them together), "probe" by
    how much the loss does fall with the adapter live at `weight` (a forward pass over the examples for each).

    Probes are of 64 candidates at a time, so that thousands need not fit into memory. `n_jobs` workers, or those that
    `joblib.parallel_config` names, run them with the same bits, and open the adapters of a hub themselves
    (docs/howto/many_machines.md); the slopes are one pass of this process.

    Equal scores keep their order. The loss is the mean over the examples of the mean loss of their target tokens. Raises
    UnknownName, InvalidTask and WeightingError before anything is run; what Composer raises for an adapter that does not fit
    the model or has a trained head; SearchFailed if no score is finite.
    """
    as_task = Task.of(task)
    if by not in WAYS:
        raise UnknownName(f"no way {by!r} to rerank by{nearest(str(by), WAYS)}; there are {', '.join(WAYS)}")
    if not as_task.examples:
        raise InvalidTask("the task has no examples to rerank by; give at least one (input, target) pair")
    check_options("rerank()", {"weight": weight, "batch_size": batch_size}, {"weight": float, "batch_size": Count})
    if weight == 0:
        raise WeightingError(f"weight is {weight!r}; it must be a finite number other than 0")
    if not candidates:
        return []
    names = list(dict.fromkeys(candidate.name for candidate in candidates))
    experts = experts_of(hub_or_pool)
    hub = experts if isinstance(experts, Hub) else None
    rank = partial(_ranked, hub=hub, task=as_task, by=by, weight=weight, batch_size=batch_size)
    parts = in_chunks(names, PIECE if by == "probe" else len(names))
    sides = [part if isinstance(experts, Hub) else experts.subset(part) for part in parts]
    if len(sides) == 1:
        ranked = rank(lambda: (model, tokenizer), sides[0])
    else:
        pieces = {f"{number} of {len(sides)}": side for number, side in enumerate(sides, start=1)}
        work = partial(rank, base_loader(model, tokenizer, n_jobs))
        with progress_bar(progress) as bar:
            ranked_by_piece = require_all(dict(spread(work, pieces, n_jobs=n_jobs, label="probing", bar=bar)))
        ranked = {name: scored for piece in ranked_by_piece.values() for name, scored in piece.items()}
    if not any(math.isfinite(score) for score, _ in ranked.values()):
        raise SearchFailed(f"none of the {len(names)} candidates has a finite score by {by!r} on the examples")
    reranked = []
    for candidate in candidates:
        score, evidence = ranked[candidate.name]
        worst_if_broken = score if math.isfinite(score) else -math.inf
        reranked.append(replace(candidate, score=worst_if_broken, evidence=f"{evidence}; {candidate.evidence}"))
    return sorted(reranked, key=lambda candidate: -candidate.score)


def _ranked(
    load: Callable[[], tuple[Any, Any]],
    side: ExpertPool | Sequence[str],
    *,
    hub: Hub | None,
    task: Task,
    by: str,
    weight: float,
    batch_size: int,
) -> _Ranking:
    """Return {name: (score, evidence)} of the candidates `side`: a pool, or names of adapters in `hub`.

    `load` returns model and tokenizer; the other arguments are those of `rerank`.
    """
    model, tokenizer = load()
    pool = side if isinstance(side, ExpertPool) else cast(Hub, hub).pool(side)
    engine = Composer(model, pool, tokenizer=tokenizer)
    try:
        if by == "probe":
            return _by_probe(engine, tokenizer, task, weight)
        uniform = dict.fromkeys(pool.names, weight / len(pool))
        begun = first_order(engine, tokenizer, task, mixture=uniform, batch_size=batch_size)
        start = f"loss {begun.loss:.3f} of the uniform mixture begins to change by"
        changes = {name: slope * weight for name, slope in begun.slopes.items()}
        return {name: (-change, f"{start} {change:+.3f} at weight {weight:g}") for name, change in changes.items()}
    finally:
        engine.close()


def _by_probe(engine: Composer, tokenizer: Any, task: Task, weight: float) -> _Ranking:
    names = engine.pool.names
    objective = ExampleLoss(engine, tokenizer, task, l1=0.0)
    mixtures = [MixtureWeights.of(mixture, names) for mixture in ({}, *({name: weight} for name in names))]
    base, *losses = objective.scores(mixtures)[0].mean(axis=1).tolist()
    return {
        name: (base - loss, f"loss {base:.3f} becomes {loss:.3f} at weight {weight:g}")
        for name, loss in zip(names, losses, strict=True)
    }


@dataclass(frozen=True)
class LossSlopes:
    """The loss on the examples at a mixture, and each expert's d loss / d weight there."""

    loss: float
    slopes: Mapping[str, float]


def first_order(
    engine: Composer, tokenizer: Any, task: Task, *, mixture: Mapping[str, float] | None = None, batch_size: int = 8
) -> LossSlopes:
    """Return the slope d loss / d weight of each expert in the engine's pool, for the mean loss over the task's examples.

    They are taken at `mixture`, {name: weight}, by default the base model. It takes one forward and one backward pass for
    each `batch_size` examples, whatever the size of the pool. Products are in fp32 or better. The model is left unchanged.
    Raises InvalidTask for examples that cannot be encoded, AlreadyActive while another Composer is active, CompositionError
    for a loss that is not finite.
    """
    model, pool = engine.model, engine.bound_pool
    for name in pool.invocations():
        require_everywhere(name, pool[name], "the slope of the loss is that of an expert that acts on every token")
    rows = encode_pairs(model, tokenizer, task, task.examples)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    total = 0.0
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        # also without a mixture: other Composers are kept away from the model meanwhile
        stack.enter_context(engine.activate(mixture or {}))
        # below a caller's inference_mode, tensors would take no part in a backward pass
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if fused := next((name for name, layer in engine.target_layers.items() if layer.number is not None), None):
            raise CompositionError(
                f"layer {fused!r} is an expert of a fused parameter, whose slopes are not known: choose by search instead"
            )
        slopes = [_Slopes(layer, pool.stacked(name), len(pool)) for name, layer in engine.target_layers.items()]
        for layer in slopes:
            stack.callback(layer.target.module.register_forward_hook(layer.saw, with_kwargs=True).remove)
        for start in range(0, len(order), batch_size):
            chunk = batch(model, tokenizer, [rows[index] for index in order[start : start + batch_size]])
            loss = mean_losses(model, chunk).sum() / len(rows)
            total += float(loss.detach())
            if not math.isfinite(total):
                raise CompositionError(
                    f"the loss on the examples is {total}, so nothing can be said of its change; load the model in a wider "
                    "dtype, or look for damaged weights"
                )
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
    slope_E = torch.stack([layer.slope_E.cpu() for layer in slopes]).sum(dim=0)
    return LossSlopes(total, dict(zip(pool.names, slope_E.tolist(), strict=True)))


class _Slopes:
    """One layer's share of d loss / d w_e for each of E experts (`slope_E`), summed over backward passes."""

    def __init__(self, target: TargetLayer, stack: StackedFactors, num_experts: int) -> None:
        self.target = target
        self._kind = target.kind
        parameter = next(target.module.parameters())
        self.slope_E = torch.zeros(num_experts, dtype=torch.float64, device=parameter.device)
        self._stack = stack
        self._placed: dict[torch.dtype, StackedFactors] = {}
        self._wanted = torch.zeros((), device=parameter.device, requires_grad=True)

    def saw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        return GradientTap.apply(output, self._wanted, x, self.receive)  # type: ignore[no-untyped-call, no-any-return]

    @torch.no_grad()
    def receive(self, gradient: Tensor, x: Tensor) -> None:
        """Add to the slopes one call of the layer: its input x and the loss's gradient by its output."""
        g_NO = self._kind.rows(self.target.module, gradient).flatten(0, 1)
        # padding gets no gradient, and neither do tokens that no target looks back to
        touched_N = g_NO.any(dim=1)
        exact = torch.promote_types(gradient.dtype, torch.float32)
        g_NO = g_NO[touched_N].to(exact)
        stack = self._on(g_NO)
        slope_S = (self._project(x, stack.a_SI, touched_N) * (g_NO @ stack.b_OS)).sum(dim=0, dtype=torch.float64)
        self.slope_E.index_add_(0, stack.owner_S, slope_S)
        if stack.gain_EO is not None:
            y_NO = self._project(x, self.target.dense_weight_OI().to(exact), touched_N)
            self.slope_E += stack.gain_EO.double() @ (g_NO * y_NO).sum(dim=0, dtype=torch.float64)
        if stack.bias_EO is not None:
            self.slope_E += stack.bias_EO.double() @ g_NO.sum(dim=0, dtype=torch.float64)

    def _project(self, x: Tensor, rows_SI: Tensor, touched_N: Tensor) -> Tensor:
        """Return x rows^T (N, S) for the N tokens with a gradient, `touched_N`."""
        if self._kind is linear:
            return functional.linear(x.reshape(-1, self.target.num_inputs)[touched_N].to(rows_SI.dtype), rows_SI)
        return self._kind.project(self.target.module, x, rows_SI).flatten(0, 1)[touched_N]

    def _on(self, g_NO: Tensor) -> StackedFactors:
        """Return the stacked factors on the layer's device, in the dtype of `g_NO`."""
        if g_NO.dtype not in self._placed:
            device, stack = self.slope_E.device, self._stack
            self._placed[g_NO.dtype] = StackedFactors(
                stack.a_SI.to(device, g_NO.dtype),
                stack.b_OS.to(device, g_NO.dtype),
                stack.owner_S.to(device),
                None if stack.gain_EO is None else stack.gain_EO.to(device),
                None if stack.bias_EO is None else stack.bias_EO.to(device),
            )
        return self._placed[g_NO.dtype]
