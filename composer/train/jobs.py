"""Jobs that share one pass through a frozen base, as ASPEN's BatchFusion: each has its own rows of a batch.

The base runs once for all jobs. A job's gradients are those of training it alone, because no row of one job reaches the
parameters of another (Ye et al. 2023, arXiv 2312.02515).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from loraweave.common.checks import is_collection
from loraweave.common.descent import seeded, warmed_cosine
from loraweave.common.options import Count, Positive, Whole
from loraweave.composer.live.call import arguments_of
from loraweave.composer.model.batches import IGNORED, EncodedRow, TargetBatch, batch, pad_apart, tensors_in
from loraweave.errors import TrainingError
from loraweave.routers.tokens._call import current_prompts
from loraweave.types import Factors

WARMUP_STEPS = 10
FAR = 5
Row = TypeVar("Row")


@dataclass(frozen=True)
class Pace:
    """The pace of a job: `steps` of `batch_size` rows each, after `warmup` steps of a rising rate."""

    steps: Count = 60
    lr: Positive = 3e-3
    batch_size: Count = 8
    seed: int = 0
    warmup: Whole = WARMUP_STEPS

    def rate(self, step: int) -> float:
        """Return the learning rate: linear warm-up to `lr` in at most half of the steps, then half a cosine down to 0."""
        return warmed_cosine(self.lr, step, self.steps, min(self.warmup, self.steps // 2))

    def rows(self, rows: Sequence[EncodedRow], job: str, step: int) -> list[EncodedRow]:
        """Return the rows of one step: epochs in shuffled order, the same for the same (seed, job, step)."""
        return Stream(rows, self.seed, job).at(step, self.batch_size)


@dataclass(frozen=True)
class Stream(Generic[Row]):
    """A stream of rows in epochs of shuffled order; `key` seeds the order, so that two streams of one training differ."""

    rows: Sequence[Row]
    seed: int
    key: str

    def at(self, step: int, count: int) -> list[Row]:
        """Return the `count` rows of one step, counted from 0."""
        chosen: list[Row] = []
        orders: dict[int, list[int]] = {}
        for place in range(step * count, (step + 1) * count):
            epoch, offset = divmod(place, len(self.rows))
            if epoch not in orders:
                orders[epoch] = torch.randperm(len(self.rows), generator=seeded(self.seed, self.key, epoch)).tolist()
            chosen.append(self.rows[orders[epoch][offset]])
        return chosen


@dataclass(frozen=True)
class LoraSettings(Pace):
    """The settings of a training of adapters. `alpha / rank` is the scale of an update, `warmup` a number of steps."""

    rank: Count = 8
    alpha: Positive = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    linearized: bool = False

    @classmethod
    def of(cls, target_modules: Sequence[str], alpha: float | None, *, rank: int, **others: Any) -> Self:
        """Return the settings; `alpha` is 2 * rank if None. Raises TrainingError unless path endings are a list."""
        if not is_collection(target_modules) or not target_modules:
            raise TrainingError(f"target_modules is {target_modules!r}; it must be a list of endings of module paths")
        return cls(target_modules=tuple(target_modules), alpha=2.0 * rank if alpha is None else alpha, rank=rank, **others)


class LowRank(NamedTuple):
    """An update by a product of factors, scale * (x a_RI^T) b_OR^T."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


class TrainingJob(ABC):
    """The parameters of a job, and the updates that they add to the base's layers for the job's own rows of a batch.

    An adapter's update is one product of factors in each layer (`LoraJob`); the products of all jobs in a layer are one step
    of autograd. A model of experts has no such product: it computes its `update` from the inputs of its own rows, by gates
    and experts (`composer/experts/together.py`). Its `penalty` is added to the loss of the targets. No row of one job
    reaches the parameters of another: a job's gradients are those of training it alone.
    """

    name: str

    @property
    @abstractmethod
    def layers(self) -> Collection[str]:
        """The module paths of the layers whose outputs the job changes."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Return the tensors that are trained, in an order that does not change."""

    def take(self, rows: Sequence[EncodedRow], step: int | None) -> None:  # noqa: B027 - factors are the same for all rows
        """Set the job's rows of the next forward: of training step `step`, counted from 0, or of an evaluation if None."""

    def begin(self, inputs: Mapping[str, Any], prompt_BT: Tensor | None) -> None:  # noqa: B027
        """Begin a forward, given the model's arguments and the mask of prompt tokens, both cut to the job's rows.

        With gradients enabled the forward is a step of training, without them an evaluation.
        """

    def low_rank(self, layer: str) -> LowRank | None:
        """Return the update of a layer if it is one product of factors; else None, and `update` is called."""
        return None

    @abstractmethod
    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        """Return update_BTO of a layer for the job's rows of its input."""

    def penalty(self) -> Tensor | None:
        """Return a scalar to add to the loss of the last forward's targets, or None."""
        return None


Pairs = Mapping[str, tuple[Tensor, Tensor]]


class LoraJob(TrainingJob):
    """A job of trainable factors {layer: (a_RI, b_OR)} in fp32; the update of a layer is `scale` times their product."""

    def __init__(self, name: str, factors: Pairs, scale: float) -> None:
        self.name = name
        self.scale = scale
        # by rank row in memory, as the products of the gradient give it
        laid = {layer: (a_RI, b_OR.T.contiguous().T) for layer, (a_RI, b_OR) in factors.items()}
        self.factors = {layer: (a_RI.requires_grad_(), b_OR.requires_grad_()) for layer, (a_RI, b_OR) in laid.items()}

    @property
    def layers(self) -> Collection[str]:
        return self.factors.keys()

    def parameters(self) -> list[Tensor]:
        """Return the factors that are trained."""
        return [tensor for pair in self.factors.values() for tensor in pair if tensor.requires_grad]

    def freeze_a(self) -> None:
        """Train b alone from now on."""
        for a_RI, _ in self.factors.values():
            a_RI.requires_grad_(False)

    def low_rank(self, layer: str) -> LowRank:
        return LowRank(*self.factors[layer], self.scale)

    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        """Return update_BTO in the dtype of x."""
        a_RI, b_OR, scale = self.low_rank(layer)
        return functional.linear(functional.linear(x_BTI, a_RI.to(x_BTI.dtype)), (scale * b_OR).to(x_BTI.dtype))

    def result(self) -> dict[str, Factors]:
        """Return the update as factors with the scale folded into b, detached copies on the CPU."""
        products = {layer: self.low_rank(layer) for layer in self.layers}
        return {
            layer: Factors(a_RI.detach().cpu().clone(), (b_OR.detach().cpu() * scale).contiguous())
            for layer, (a_RI, b_OR, scale) in products.items()
        }


def new_factors(
    name: str, layers: Mapping[str, tuple[int, int]], *, rank: int, seed: int, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return new factors of layers (O, I): a uniform in +-1/sqrt(I), PEFT's default, by seed, name and layer; b zero."""
    factors = {}
    for layer, (num_outputs, num_inputs) in layers.items():
        # seeded by names, so that a job starts the same whatever jobs share its batch
        a_RI = torch.rand(rank, num_inputs, generator=seeded(seed, name, layer)).mul(2).sub(1)
        factors[layer] = (float(num_inputs**-0.5) * a_RI).to(device), torch.zeros(num_outputs, rank, device=device)
    return factors


def given_factors(start: Mapping[str, Factors], *, scale: float, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of an adapter's factors with the scale taken out of b: exact if it is a power of two, else rounded."""
    return {
        layer: (part.a_RI.to(device, torch.float32, copy=True), part.b_OR.to(device, torch.float32) / scale)
        for layer, part in start.items()
    }


class JobKind:
    """A kind of training job; this class is plain LoRA. A subclass makes jobs of another class; workers get it pickled."""

    # True for a training to first order: the new factors of all jobs begin alike, and the card says so
    linearized: ClassVar[bool] = False

    def require(self, model: Any, start: Collection[str]) -> None:
        """Raise if the model lacks what jobs of this kind need, or if a task's `start` does not suit the kind."""

    def make(self, name: str, pairs: Pairs, scale: float) -> LoraJob:
        """Return a job that starts from `pairs`, {layer: (a_RI, b_OR)}; updates are `scale` times their products."""
        return LoraJob(name, pairs, scale)

    def recipe(self) -> dict[str, Any]:
        """Return the entries that the kind adds to the recipe on an adapter's card, as JSON."""
        return {}

    def identity(self) -> list[str]:
        """Return the texts that, besides settings, rows and start, determine a result of this kind."""
        return []


LORA = JobKind()


class SharedPass:
    """A context manager in which the model's layers add each job's update to that job's rows of the batch.

    `row_counts` has the number of rows of each job, in the order of the jobs; by default all jobs have equally many. Leaving
    removes every hook, also after an exception.
    """

    def __init__(self, model: nn.Module, jobs: Sequence[TrainingJob], row_counts: Sequence[int] | None = None) -> None:
        self.model = model
        self.members = tuple(jobs)
        self.row_counts = tuple(row_counts or [1] * len(jobs))
        self._handles: list[Any] = []

    def __enter__(self) -> SharedPass:
        try:
            # factors are the same in every call
            if any(type(job).begin is not TrainingJob.begin for job in self.members):
                self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            for layer in dict.fromkeys(layer for job in self.members for layer in job.layers):
                module = self.model.get_submodule(layer)
                self._handles.append(module.register_forward_hook(partial(self._add_updates, layer)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs, known = arguments_of(model, args, kwargs), current_prompts()
        start, num_rows = 0, sum(self.row_counts)
        for job, count in zip(self.members, self.row_counts, strict=True):
            place = (start, start + count, num_rows)
            job_inputs = {name: _cut(value, *place) for name, value in tensors_in(inputs).items()}
            job.begin({**inputs, **job_inputs}, None if known is None else _cut(known.mask_BT, *place))
            start += count

    def _add_updates(self, layer: str, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Return y, the layer's output, with all jobs' updates added, possibly in place."""
        x = args[0]
        num_tokens, num_rows = x.numel() // x.shape[-1], sum(self.row_counts)
        ends = list(accumulate([count * num_tokens // num_rows for count in self.row_counts], initial=0))
        ranges, factors, others = [], [], []
        for job, (start, stop) in zip(self.members, pairwise(ends), strict=True):
            if layer not in job.layers:
                continue
            if (product := job.low_rank(layer)) is None:
                others.append((job, start, stop))
            else:
                ranges.append(RowRange(start, stop, product.scale))
                factors.append((product.a_RI, product.b_OR))
        if ranges:
            y = add_products(y, x, ranges, factors)
        return self._with_others(layer, others, x, y) if others else y

    def _with_others(self, layer: str, jobs: Sequence[tuple[TrainingJob, int, int]], x: Tensor, y: Tensor) -> Tensor:
        num_rows, num_tokens = sum(self.row_counts), x.numel() // x.shape[-1]
        x_BTI, y_NO = x.reshape(num_rows, -1, x.shape[-1]), y.reshape(num_tokens, -1)
        parts, end = [], 0
        for job, start, stop in jobs:
            rows = slice(start * num_rows // num_tokens, stop * num_rows // num_tokens)
            update_NO = job.update(layer, x_BTI[rows]).reshape(stop - start, -1).to(y.dtype)
            parts += [y_NO[end:start], y_NO[start:stop] + update_NO]
            end = stop
        return torch.cat([*parts, y_NO[end:]]).view_as(y)


def _cut(value: Tensor, start: int, stop: int, num_rows: int) -> Tensor:
    """Return a job's rows of a tensor whose first axis has the batch's rows; return any other tensor whole."""
    if value.ndim == 0 or len(value) % num_rows:
        return value
    copies = len(value) // num_rows
    return value[start * copies : stop * copies]


class LoraJobs(SharedPass):
    """A shared pass of LoRA jobs with these names, each with new factors for `layers`, which has each target layer's (O, I).

    A job in `start` begins as those factors instead, with their layers and ranks: to the bit where `alpha / rank` is a power
    of two, else to rounding.
    """

    members: tuple[LoraJob, ...]

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, tuple[int, int]],
        jobs: Sequence[str],
        settings: LoraSettings,
        start: Mapping[str, Mapping[str, Factors]] | None = None,
    ) -> None:
        begins = start or {}
        super().__init__(model, [lora_job(model, name, layers, settings, begins.get(name)) for name in jobs])
        self.jobs = tuple(jobs)

    def parameters(self) -> list[Tensor]:
        """Return the tensors that are trained in all jobs."""
        return [tensor for job in self.members for tensor in job.parameters()]

    def layers_of(self, name: str) -> dict[str, Factors]:
        """Return one job's update, as detached copies on the CPU."""
        return self.members[self.jobs.index(name)].result()


def lora_job(
    model: nn.Module,
    name: str,
    layers: Mapping[str, tuple[int, int]],
    settings: LoraSettings,
    start: Mapping[str, Factors] | None,
    kind: JobKind = LORA,
) -> LoraJob:
    """Return a job of the kind that trains new factors for `layers`, {path: (O, I)}, or copies of those in `start`."""
    scale, device = settings.alpha / settings.rank, next(model.parameters()).device
    if start is None:
        pairs = new_factors("" if kind.linearized else name, layers, rank=settings.rank, seed=settings.seed, device=device)
    else:
        pairs = given_factors(start, scale=scale, device=device)
        pairs = {layer: _at_usual_scale(*pair) for layer, pair in pairs.items()}
    return kind.make(name, pairs, scale)


def _at_usual_scale(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product: an a FAR powers of 2 from rows of norm 1, which new ones have, is brought there.

    AdamW's steps do not grow with a factor: beside an a of a thousand (8-bit forms), b would learn a thousand times as fast.
    """
    exponent = math.frexp(float(a_RI.norm(dim=1).sum()) / max(1, len(a_RI)))[1]
    return (a_RI, b_OR) if abs(exponent) < FAR else (a_RI * 2.0**-exponent, b_OR * 2.0**exponent)


class RowRange(NamedTuple):
    """A range of tokens, counted over the flattened batch from `start` to before `stop`, and the scale of its update."""

    start: int
    stop: int
    scale: float


def add_products(y: Tensor, x: Tensor, ranges: Sequence[RowRange], factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return y with s (x a^T) b^T added at each range, (a_RI, b_OR) being its factors; gradients reach y, x and factors.

    Products run in the dtype of x. The result may share y's memory, so y must not be used afterwards; ranges are in
    ascending order and do not overlap.
    """
    # in a view autograd would keep track of the whole, at the cost of copies
    writable_y = (
        y.clone(memory_format=torch.contiguous_format)
        if y._is_view() or not y.is_contiguous() or (y.is_leaf and y.requires_grad)
        else y
    )
    added: Tensor = _RowProducts.apply(writable_y, x, tuple(ranges), *chain.from_iterable(factors))  # type: ignore[no-untyped-call]
    return added


class _RowProducts(torch.autograd.Function):
    """A step of autograd that keeps x, the factors and the hidden values; twice differentiated, it raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, ranges: tuple[RowRange, ...], *factors: Tensor) -> Tensor:
        x_NI, y_NO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        hidden = []
        for (start, stop, scale), a_RI, b_OR in zip(ranges, factors[::2], factors[1::2], strict=True):
            hidden_MR = (x_NI[start:stop] @ a_RI.to(x.dtype).T).mul_(scale)
            # below autocast y may be of another dtype than x
            y_NO[start:stop].addmm_(hidden_MR.to(y.dtype), b_OR.to(x.dtype).to(y.dtype).T)
            hidden.append(hidden_MR)
        ctx.mark_dirty(y)
        ctx.ranges = ranges
        ctx.save_for_backward(x, *factors, *hidden)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        ranges, needed = ctx.ranges, ctx.needs_input_grad
        factors, hidden = kept[: 2 * len(ranges)], kept[2 * len(ranges) :]
        x_NI, grad_NO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        whole = sum(part.stop - part.start for part in ranges) == len(x_NI)
        grad_x_NI = (torch.empty_like if whole else torch.zeros_like)(x_NI) if needed[1] else None
        gradients: list[Tensor | None] = []
        for index, (start, stop, scale) in enumerate(ranges):
            a_RI, b_OR = factors[2 * index : 2 * index + 2]
            grad_MO = grad_NO[start:stop]
            mixed_MR = (grad_MO @ b_OR.to(x.dtype)).mul_(scale)
            if grad_x_NI is not None:
                torch.mm(mixed_MR, a_RI.to(x.dtype), out=grad_x_NI[start:stop])
            # the narrow operand is the one that is transposed: a wide one would be copied in bf16
            gradients.append((mixed_MR.T @ x_NI[start:stop]).to(a_RI.dtype) if needed[3 + 2 * index] else None)
            gradients.append((hidden[index].T @ grad_MO).T.to(b_OR.dtype) if needed[4 + 2 * index] else None)
        return grad if needed[0] else None, None if grad_x_NI is None else grad_x_NI.view_as(x), None, *gradients


def job_losses(model: Any, tokenizer: Any, rows: Sequence[EncodedRow], num_jobs: int) -> Tensor:
    """Return loss_J: the mean over the target tokens of each job's rows; all jobs have the same number of rows."""
    return range_losses(model, tokenizer, rows, [len(rows) // num_jobs] * num_jobs)


def range_losses(model: Any, tokenizer: Any, rows: Sequence[EncodedRow], row_counts: Sequence[int]) -> Tensor:
    """Return loss_J: the mean over the target tokens of each job's rows; `row_counts` has their numbers."""
    stacked = batch(model, tokenizer, rows)
    if model.config.is_encoder_decoder:
        # gates count the tokens of encoder and decoder apart
        stacked = pad_apart(stacked)
    sums_B = row_losses(model, rows, stacked).sum(dim=1)
    counts_B = (stacked.targets_BK != IGNORED).sum(dim=1)
    sizes = list(row_counts)
    pairs = zip(torch.split(sums_B, sizes), torch.split(counts_B, sizes), strict=True)
    return torch.stack([sums.sum() / counts.sum() for sums, counts in pairs])


def row_losses(model: Any, rows: Sequence[EncodedRow], stacked: TargetBatch) -> Tensor:
    """Return loss_BK of the rows' target tokens, by the loss of their class, or by `EncodedRow`'s for several classes."""
    kinds = {type(row) for row in rows}
    kind = kinds.pop() if len(kinds) == 1 else EncodedRow
    return kind.losses(model, rows, stacked)
