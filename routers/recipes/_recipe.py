"""Base classes of recipes, which describe a trainable mixture as data; `composer/experts` builds it on a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Never

import torch
from torch import Tensor

from loraweave.common.options import Count, Declared, NonNegative, Positive, Rate
from loraweave.errors import WeightingError
from loraweave.routers.losses.mixtral import mixtral
from loraweave.routers.recipes._gate import Gate, TokenGate
from loraweave.routers.tokens._learned import Step

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Site:
    """A place of the model that gets experts: its module's path, its sizes, and its block's index among `num_blocks`.

    `block` is None outside the blocks. For a convolution `num_inputs` counts all values under the kernel. `num_features` is
    the size of the model's input embeddings, 0 if it has none. `parts` are the layers of the site that have factors, in the
    order in which they run, if the site itself is not a layer.
    """

    name: str
    num_inputs: int
    num_outputs: int
    block: int | None = None
    num_blocks: int = 0
    kernel: tuple[int, ...] = ()
    num_features: int = 0
    parts: tuple[Site, ...] = ()


@dataclass(frozen=True)
class ExpertShape:
    """The ranks of a site's experts, and the factors that they share.

    `shared_a` and `shared_b` say that all experts share one a, or one b. With `gains` each expert has a learned factor for
    each output, which begins as 0.
    """

    ranks: tuple[int, ...]
    shared_a: bool = False
    shared_b: bool = False
    gains: bool = False

    @property
    def num_experts(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, kw_only=True)
class Recipe(Declared):
    """The base class of recipes, with the options of all: y = y0 + sum over e of w_e * alpha / rank * B_e A_e dropout(x).

    `target_modules` are endings of module paths. `tasks` names what a row may belong to, in the order of their ids; fit()
    takes the names of its dataset where it is left empty. `seed` determines all initial values.
    """

    rank: Count = 8
    alpha: Positive | None = None
    dropout: Rate = 0.0
    target_modules: tuple[str, ...] = ATTENTION + FEED_FORWARD
    tasks: tuple[str, ...] = ()
    seed: int = 0

    noun: ClassVar[str] = "recipe"
    # how the experts of a site enter its output: a name of the registry `forms`
    form: ClassVar[str] = "sum_of_experts"
    # whether every row has to have a task
    needs_tasks: ClassVar[bool] = False
    # whether gates look at the task of a row that has one, though not every row has to have one
    heeds_tasks: ClassVar[bool] = False
    # default learning rate of fit()
    lr: ClassVar[float] = 3e-3
    # raised whenever the same options come to mean another training, so that older checkpoints are not resumed
    revision: ClassVar[int] = 1
    # options that a saved folder lacks, {name: value}, where their value there is not today's default
    before: ClassVar[Mapping[str, Any]] = {}
    # parts of the names of parameters that have no gradient in the first step, because their factor begins as 0
    silent_at_first: ClassVar[tuple[str, ...]] = ("a_SI",)

    def __post_init__(self) -> None:
        if not self.target_modules:
            self.refuse("target_modules", "name the endings of the layers that get experts")
        if len(set(self.tasks)) < len(self.tasks):
            self.refuse("tasks", "each name once")

    @property
    def name(self) -> str:
        """The recipe's name in the registry."""
        return self.registered_name()

    @property
    def options(self) -> dict[str, Any]:
        """The options that the recipe was made with, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def num_first_steps(self) -> int:
        """The number of training steps after which every parameter that learns has had a gradient, at the latest.

        In the first step one factor is 0, so that only this one has a gradient. Where rows use few of E experts, the second
        step may use others; by step E + 1 one of them has been used twice.
        """
        return 2

    @property
    def scale(self) -> float:
        """The factor before the sum: alpha / rank, unless the recipe says otherwise."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank

    def shape(self, site: Site) -> ExpertShape | None:
        """Return the shape of a site's experts, or None for a site that gets none."""
        raise NotImplementedError

    def roles(self, site: Site, shape: ExpertShape) -> tuple[Hashable, ...]:
        """Return a key for each expert of a site, by which it is found under other options; by default its index."""
        return tuple(range(shape.num_experts))

    def gate_key(self, site: Site) -> str:
        """Return the key of a site's gate: sites with the same key share one; by default each has its own."""
        return site.name

    def gate(self, site: Site, num_experts: int) -> Gate | None:
        """Make the gate that weighs the experts of the site, or None for weights of 1."""
        raise NotImplementedError

    def reader(self, sites: Sequence[Site]) -> Gate | None:
        """Return the one gate to be shown each call before layers run, on behalf of all; None to show it to every gate."""
        return None

    def start(self, site: Site, expert: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the (a_RI, b_RO) that an expert begins with: a uniformly between -1/sqrt(I) and 1/sqrt(I), b zero."""
        a_RI = uniform(rank, site.num_inputs, generator)
        return a_RI, torch.zeros(rank, site.num_outputs)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Return named terms to add to the model's loss, with their coefficients applied."""
        return {}

    def factor_losses(self, a_SI: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return named loss terms of the experts' factors, {site: a_SI}, with their coefficients applied."""
        return {}

    def refuse(self, option: str, way_out: str) -> Never:
        """Raise WeightingError that names the option, its value and the `way_out`."""
        raise WeightingError(f"recipe {self.name!r} got {option}={getattr(self, option)!r}; {way_out}")

    def require_top_k(self, num_experts: int) -> None:
        """Raise WeightingError if `top_k` is above the number of experts."""
        if self.options["top_k"] > num_experts:
            self.refuse("top_k", f"it takes a whole number from 1 to the number of experts, {num_experts}")


@dataclass(frozen=True, kw_only=True)
class EvenRecipe(Recipe):
    """A recipe whose sites all have `num_experts` experts of its rank."""

    num_experts: Count = 8

    @property
    def num_first_steps(self) -> int:
        # each token may use only a few of the experts
        return self.num_experts + 1

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((self.rank,) * self.num_experts)


@dataclass(frozen=True, kw_only=True)
class TopKRecipe(EvenRecipe):
    """An even recipe that gives each token `top_k` experts, and adds `balance` times the loss `mixtral`."""

    top_k: Count = 2
    balance: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(self.num_experts)

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        return TokenGate(site.num_inputs, num_experts, top_k=self.top_k)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return balance_term(self.balance, step, self.top_k)


def uniform(rank: int, num_inputs: int, generator: torch.Generator) -> Tensor:
    """Draw a_RI uniformly between -1/sqrt(I) and 1/sqrt(I), as PEFT does (kaiming_uniform with a = sqrt(5))."""
    return float(num_inputs**-0.5) * torch.rand(rank, num_inputs, generator=generator).mul(2).sub(1)


def balance_term(coefficient: float, step: Step, top_k: int) -> Mapping[str, Tensor]:
    """Return {"balance": coefficient * the mean over sites of the loss `mixtral`}; {} for a coefficient of 0."""
    if not coefficient:
        return {}
    return {"balance": coefficient * by_layer(step, lambda scores_NE: mixtral(scores_NE, top_k)).mean()}


def by_layer(step: Step, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return loss_L: `loss(scores_NE)` over the real tokens of each layer whose gate noted scores."""
    return torch.stack([loss(step.real(scores_BTE)) for scores_BTE in step.scores.values()])
