"""The members of an ensemble beside each other in one batch: the rows of one, then the next one's, under their mixtures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraweave.common.checks import is_list
from loraweave.composer.composer import Composer
from loraweave.composer.live.resolve import resolve
from loraweave.composer.model.batches import tensors_in
from loraweave.composer.model.scoring import equal_shares
from loraweave.errors import CompositionError, WeightingError
from loraweave.routers.weights import MixtureWeights

# of one forward pass: bounds what the layers hold, and what the language head gives
MAX_TOKENS = 2**13
MAX_LOGITS = 2**26

Inputs = dict[str, Any]


def member_passes(
    engine: Composer,
    mixtures: Sequence[Any],
    batch: Mapping[str, Any],
    read: Callable[[Inputs], Tensor],
    *,
    rows_per_pass: int,
) -> Tensor:
    """Return read(inputs) of every member's rows, (M, B, ...); `read` runs the model and returns a tensor by rows.

    Several members share a forward pass where `rows_per_pass` lets them; a batch above it is run in parts. Tensors of the
    batch whose first axis has its number of rows are laid out by row, all else is passed on as it is.
    Raises CompositionError for what is neither by row nor shared: a cache, several images for a text.
    """
    num_rows = rows_of(batch)
    _require_rows(batch, num_rows)
    members_per_pass = max(1, rows_per_pass // num_rows)
    parts = []
    with torch.no_grad():
        for row in range(0, num_rows, rows_per_pass):
            size = min(rows_per_pass, num_rows - row)
            member_values = []
            for member in range(0, len(mixtures), members_per_pass):
                some = list(mixtures[member : member + members_per_pass])
                with engine.activate(some):
                    values = read(by_rows(batch, partial(repeated, count=len(some), rows=slice(row, row + size))))
                member_values.append(values.view(len(some), size, *values.shape[1:]))
            parts.append(torch.cat(member_values))
    return torch.cat(parts, dim=1)


def _require_rows(batch: Mapping[str, Any], num_rows: int) -> None:
    tensors = tensors_of(batch)
    for key, value in batch.items():
        odd = key in tensors and value.dim() > 1 and len(value) not in (1, num_rows)
        if odd or (key in ("past_key_values", "cache") and value is not None):
            what = f"shape {tuple(value.shape)}" if odd else type(value).__name__
            raise CompositionError(
                f"{key!r} of the batch ({what}) cannot be given to each member's {num_rows} rows: give inputs that have as "
                "many rows as the batch, and no cache"
            )


def known_members(engine: Composer, mixtures: Sequence[Any]) -> list[Any]:
    """Return the members, each as activate() takes it for a row. Raises WeightingError for anything else, UnknownExpert."""
    if not is_list(mixtures) or not mixtures:
        raise WeightingError(
            f"the members of an ensemble are a list of at least one mixture, not {mixtures!r}; put a single one into a list"
        )
    for number, mixture in enumerate(mixtures):
        if isinstance(mixture, str | list | tuple):
            raise WeightingError(
                f"member {number} of the ensemble is {mixture!r}; a member is one mixture for all rows: {{name: weight}}, "
                "None for the base, MixtureWeights of one row, or a router"
            )
    if not isinstance(engine, Composer):
        raise WeightingError(
            f"an ensemble mixes the experts of a Composer, and {engine!r:.80} is not one: pass lw.Composer(model, pool)"
        )
    members = [_by_name(mixture) for mixture in mixtures]
    resolve(members, engine.pool, engine.bound_pool)
    return members


def member_weights(weights: Sequence[float] | None, num_members: int) -> Tensor:
    """Return weight_M, fp64, of sum 1; None gives all members the same. Raises WeightingError unless they are shares."""
    if weights is None:
        return equal_shares(num_members)
    weight_M = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    if len(weight_M) != num_members:
        raise WeightingError(f"there are {len(weight_M)} weights for {num_members} members; give one for each")
    if not bool(torch.isfinite(weight_M).all()) or bool((weight_M < 0).any()) or not float(weight_M.sum()) > 0:
        raise WeightingError(
            f"the members' weights are {weight_M.tolist()}; they are shares of an average: at least 0, and not all 0"
        )
    return weight_M / weight_M.sum()


def tensors_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs that may have rows."""
    return {key: value for key, value in tensors_in(batch).items() if value.dim()}


def rows_of(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of the model's inputs. Raises CompositionError if there are none."""
    for value in tensors_of(batch).values():
        if len(value):
            return len(value)
    raise CompositionError("the batch has no tensor with rows; give the model's inputs, as a tokenizer returns them")


def by_rows(batch: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> Inputs:
    """Return the batch with `change` applied to the tensors that have its rows; all else is passed on as it is."""
    num_rows = rows_of(batch)
    changed = {key: change(value) for key, value in tensors_of(batch).items() if len(value) == num_rows}
    return {**batch, **changed}


def repeated(tensor: Tensor, count: int, rows: slice = slice(None)) -> Tensor:
    """Return the chosen rows of a tensor, repeated `count` times on end."""
    return tensor[rows].repeat(count, *[1] * (tensor.dim() - 1))


def rows_that_fit(batch: Mapping[str, Any], logits_per_row: int, *, copies: int = 1) -> int:
    """Return the number of rows for one forward pass, by the tokens of the longest input and the logits of a row.

    `copies` is how many rows of keys and values each row becomes.
    """
    num_tokens = max(value[0].numel() for value in tensors_of(batch).values())
    return max(1, min(MAX_TOKENS // (num_tokens * copies), MAX_LOGITS // logits_per_row))


def _by_name(mixture: Any) -> Any:
    """Return the member as {name: weight} if all layers share its weights, so that such members mix as one set of rows."""
    if isinstance(mixture, MixtureWeights) and mixture.scope == "task" and not mixture.layers:
        return mixture.as_dict()
    return mixture
