"""How rows of a training become calls of an expert model, and what of a call counts in its step's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from loraweave.composer.batches import IGNORED
from loraweave.composer.experts.labelled import called, labelled
from loraweave.composer.experts.running import has_two_sequences
from loraweave.composer.router_training.rows import TrainingRow
from loraweave.errors import TrainingError

if TYPE_CHECKING:
    from loraweave.composer.experts.expert_model import ExpertModel


class Feed(Protocol):
    """How the rows of a training go through its model. With `counts_rows` each row counts alike in the loss of a step."""

    counts_rows: bool

    def inputs_of(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The rows as one batch, with each one's place among the tasks in `task`."""

    def called(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """The model's output for a batch, and the mean loss over what counts. Raises TrainingError where there is none."""

    def count(self, inputs: Mapping[str, Any]) -> int:
        """How much of the batch counts: target tokens, or rows."""

    def labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """labels_BK of the last tokens, with `IGNORED` where no loss is asked; None where labels are not those of tokens."""

    def size(self, inputs: Mapping[str, Any]) -> int:
        """What the report counts: tokens without padding, or rows."""


class TokenFeed:
    """Rows of token ids and their targets; the loss is that of the target tokens."""

    counts_rows = False

    def __init__(self, model: ExpertModel, tokenizer: Any) -> None:
        base = model.base_model
        self._model = model
        self._two_sequences = has_two_sequences(base)
        head = getattr(base, "get_output_embeddings", lambda: None)()
        # where the head has experts, it sees all tokens that the others see
        whole = any(base.get_submodule(site) is head for site in model.sites)
        self._labelled = partial(labelled, base, tokenizer, whole=whole)

    def inputs_of(self, rows: Sequence[TrainingRow]) -> dict[str, Any]:
        """As `Feed`."""
        return {**self._labelled(rows)}

    def called(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """As `Feed`."""
        return losing(self._model, called(model, inputs, two_sequences=self._two_sequences))

    def count(self, inputs: Mapping[str, Any]) -> int:
        """Target tokens."""
        return int((inputs["labels"] != IGNORED).sum())

    def labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """As `Feed`."""
        labels: Tensor = inputs["labels"]
        return labels

    def size(self, inputs: Mapping[str, Any]) -> int:
        """Tokens without padding."""
        return int(inputs["attention_mask"].sum())


def losing(model: ExpertModel, output: Any) -> tuple[Any, Tensor]:
    """The output of a call with labels, and the base's own loss. Raises TrainingError where it has none."""
    if model.own_loss is None:
        raise TrainingError(
            f"{type(model.base_model).__name__} gives no loss for labels, so there is nothing to learn: pass "
            "loss=function(output, row's columns)"
        )
    return output, model.own_loss
