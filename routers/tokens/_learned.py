"""The base class of routers with parameters, the notes of a training step, and the report of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from loraweave.errors import ScopeError, TrainingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._members import Members
from loraweave.routers.tokens._router import TokenRouter

# the index of the expert or task of a row that names none
UNKNOWN = -1


class LearnedRouter(TokenRouter):
    """A router whose parameters `fit` trains; adapters and base stay unchanged.

    `weights` calls `note` with its scores and weights. `losses` may add terms to the model's loss, each under a name.
    """

    learned: ClassVar[bool] = True
    # whether every training row must name the expert whose task it is
    needs_experts: ClassVar[bool] = False
    # parameters, by the first part of their names, without a gradient in the first step: their factor starts at 0
    silent_at_first: ClassVar[tuple[str, ...]] = ()
    # whether each expert's parameters learn from its own rows alone: the loss is then the sum over experts of each one's
    # mean, every step has rows of each, and no expert's gradient is clipped because of another's
    apart: ClassVar[bool] = False
    # default learning rate of fit()
    lr: ClassVar[float] = 1e-3

    def __init__(self, pool: ExpertPool | Members) -> None:
        super().__init__(pool)
        self.step: Step | None = None

    @property
    def training_report(self) -> TrainingReport:
        """The report of fit(), also for a router read from a file. Raises TrainingError if it was never fitted."""
        if self.report is None:
            raise TrainingError(f"router {self.name!r} has not been trained: fit() it first")
        return TrainingReport.from_json(self.report)

    def note(self, layer: str, scores_BTE: Tensor, w_BTE: Tensor, beside: Tensor | None = None) -> Tensor:
        """Note a layer's scores, weights and what `losses` needs `beside` them, if a training step runs; return w_BTE."""
        # a layer that the backward pass runs again has been noted already
        if self.step is not None and torch._C._current_graph_task_id() == -1:
            self.step.scores[layer] = scores_BTE
            self.step.weights[layer] = w_BTE
            if beside is not None:
                self.step.beside[layer] = beside
        return w_BTE

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Return named terms to add to the loss of the step that has just run, with their coefficients applied."""
        return {}

    def fit(self, engine: Any, dataset: Any, **settings: Any) -> Self:
        """Train the parameters on a dataset, through `engine`, a Composer with a tokenizer; return self.

        `settings` are those of `loraweave.composer.train.routers.RouterSettings`.
        """
        if not hasattr(engine, "fit"):
            raise TrainingError(f"a router is trained through a Composer with a tokenizer, not {engine!r:.80}")
        engine.fit(self, dataset, **settings)
        return self


@dataclass(eq=False)
class Step:
    """A pass of a training step: its real tokens, the owner of each row, and each layer's scores and weights.

    `expert_B` is the index of the expert whose task a row belongs to, UNKNOWN if not known. `rows_B` are the rows' numbers
    in the training data, and `kept` is one mapping for all passes of a training, for tensors that do not change for a row,
    stored without padding. `scores` are before, and `weights` after, softmax and top-k; `beside` has other tensors for the
    router's own losses. `decoder_BT` are the real tokens of a decoder beside an encoder, told apart from the encoder's by
    their number. `seeds_B` seed a row's random numbers in this step, in whatever pass the row is.
    """

    mask_BT: Tensor
    expert_B: Tensor
    rows_B: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    kept: dict[Any, Any] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    decoder_BT: Tensor | None = None
    seeds_B: tuple[int, ...] = ()

    def mask_of(self, num_tokens: int) -> Tensor | None:
        """Return the boolean mask_BT of real tokens for a tensor of `num_tokens`, 1 if all share it; None if unknown.

        Raises ScopeError if the tokens may be the encoder's or the decoder's and their padding differs.
        """
        if self.decoder_BT is not None and num_tokens == self.decoder_BT.shape[1] in (1, self.mask_BT.shape[1]):
            require_alike(self.mask_BT, self.decoder_BT)
        known = [mask_BT for mask_BT in (self.mask_BT, self.decoder_BT) if mask_BT is not None]
        return next((mask_BT.bool() for mask_BT in known if num_tokens in (1, mask_BT.shape[1])), None)

    def real(self, values_BTE: Tensor) -> Tensor:
        """Return values_NE of the N real tokens; of all tokens in a layer whose tokens are not those of the call."""
        mask_BT = self.mask_of(values_BTE.shape[1])
        if mask_BT is None or mask_BT.shape[0] % values_BTE.shape[0]:
            return values_BTE.flatten(0, 1)
        values_BTE = values_BTE.repeat_interleave(mask_BT.shape[0] // values_BTE.shape[0], dim=0)
        return values_BTE.expand(*mask_BT.shape, -1)[mask_BT]

    def row_means(self, values_BTE: Tensor) -> Tensor:
        """Return values_BE, means over each row's real tokens, or over all in a layer whose tokens are not the call's."""
        mask_BT = self.mask_of(values_BTE.shape[1])
        if mask_BT is None or mask_BT.shape != values_BTE.shape[:2]:
            return values_BTE.mean(dim=1)
        real_BT1 = mask_BT[..., None].to(values_BTE.dtype)
        return (values_BTE * real_BT1).sum(dim=1) / real_BT1.sum(dim=1).clamp(min=1)


def require_alike(encoder_BT: Tensor, decoder_BT: Tensor) -> None:
    """Raise ScopeError if a layer's tokens may be the encoder's or the decoder's, whose real tokens differ."""
    same_width = encoder_BT.shape == decoder_BT.shape
    if not (torch.equal(encoder_BT.bool(), decoder_BT.bool()) if same_width else encoder_BT.all() and decoder_BT.all()):
        raise ScopeError(
            f"the encoder has {encoder_BT.shape[1]} tokens and the decoder {decoder_BT.shape[1]}, so that their number "
            "does not say whose a layer sees, and their padding differs: pad the labels with one more -100, or the input "
            "with one more token that attention_mask leaves out"
        )


@dataclass
class TrainingReport:
    """The losses of a training by step, and statistics of the weights.

    `losses` are means over each step's target tokens (over its rows if rows are tensors), without the added `terms`, {name:
    values by step}. `evaluations` are (steps done, loss of the rows held out). `entropy` is the entropy of a token's weights
    in nats, averaged over real tokens and layers; `load` has (steps done, each expert's share of all weights) of about 100
    steps at most. `dead` experts had less than a hundredth of an equal share over the last 20 steps; `collapsed` is the
    first step after which one expert had more than 0.95 of all weight over 20 steps, None if there was none. `overflow` is,
    by step, the share of the experts chosen by tokens before a target which had no capacity left; empty where there is no
    limit. The router has the parameters after `kept` steps. `tokens` are those of prompts and targets that went through the
    model, without padding; a row of tensors counts as one.
    """

    experts: tuple[str, ...]
    losses: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    load: list[tuple[int, list[float]]] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    collapsed: int | None = None
    overflow: list[float] = field(default_factory=list)
    kept: int = 0
    tokens: int = 0
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a report from JSON. Raises TypeError, KeyError or ValueError for data of another form."""
        pairs = {name: [(int(step), value) for step, value in data[name]] for name in ("evaluations", "load")}
        return cls(**{**data, **pairs, "experts": tuple(data["experts"])})
