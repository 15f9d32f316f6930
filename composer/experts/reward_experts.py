"""Experts of a reward model: the reward that each gives a row, and how they learn it from preferences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.composer.batches import padded_rows
from loraweave.composer.ensembles.inputs import right_aligned, without_cache
from loraweave.composer.ensembles.member_passes import rows_of
from loraweave.composer.ensembles.preferences import Epochs, Pairs, Settings, descend, require_pairs
from loraweave.composer.ensembles.rewards import Rewards
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.required import require_expert_model
from loraweave.errors import CompositionError, InvalidTask, TrainingError, UnknownName
from loraweave.registry import nearest


def expert_rewards(model: ExpertModel, batch: Mapping[str, Any]) -> Rewards:
    """The reward that the expert of each of the model's tasks gives each row of a batch, padded on either side.

    All run in one pass, beside each other. Raises CompositionError for a base without a head of one label.
    """
    _require_reward_model(model)
    return Rewards(_rewards(model, batch, [*range(len(model.tasks))]))


def train_reward_experts(
    model: ExpertModel,
    pairs: Pairs | Mapping[str, Pairs],
    *,
    steps: int = 300,
    lr: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> ExpertModel:
    """The model, whose experts have learned from pairs of (the text that is preferred, the other one); the base stays.

    `pairs` are for all experts, as an ensemble's members learn, or {task: pairs} for each one's own, as the capability
    points of DMoERM do. Each step takes AdamW without weight decay down the mean over `batch_size` pairs, in shuffled
    epochs, of -log sigmoid(r(preferred) - r(other)), the sum of this over experts, and the terms of the recipe.
    Raises InvalidTask for pairs that are none, UnknownName for a task that the model has not, TrainingError for settings out
    of range, for a task without pairs and for a loss that is not finite, CompositionError for a base without a head of one
    label and without a tokenizer.
    """
    settings = Settings(steps, lr, batch_size, seed)
    _require_reward_model(model)
    by_expert = _pairs_by_expert(model, pairs)
    tokens = _tokens(model, by_expert)
    learning = [parameter for parameter in model.expert_parameters().values() if parameter.requires_grad]
    # experts with the same pairs take them in the same order
    orders = [Epochs(len(own), settings.seed) for own in by_expert]

    def next_loss() -> Tensor:
        chosen = [
            [own[index] for index in order.next(settings.batch_size)] for own, order in zip(by_expert, orders, strict=True)
        ]
        return _loss(model, chosen, tokens)

    was_training = model.training
    model.train()
    try:
        descend(learning, settings, next_loss, what="the reward experts", progress=progress)
    finally:
        model.train(was_training)
    return model


def _loss(model: ExpertModel, chosen: Sequence[Pairs], tokens: Mapping[str, list[int]]) -> Tensor:
    """The sum over experts of the mean over their pairs, and the recipe's terms, in one pass of the model."""
    rows = [tokens[pair[side]] for side in (0, 1) for own in chosen for pair in own]
    experts = [expert for expert, own in enumerate(chosen) for _ in own]
    ids_BT, mask_BT = padded_rows(model.tokenizer, rows, left=False)
    batch = {"input_ids": ids_BT.to(model.device), "attention_mask": mask_BT.to(model.device)}
    preferred_N, other_N = _run(model, batch, 2 * experts).chunk(2)
    by_pair_N = functional.softplus(other_N - preferred_N)
    loss = by_pair_N.view(len(chosen), -1).mean(dim=1).sum()
    return torch.stack([loss, *(term.to(loss) for term in model.terms.values())]).sum()


def _rewards(model: ExpertModel, batch: Mapping[str, Any], experts: list[int]) -> Tensor:
    """rewards_MB of these experts."""
    num_rows = rows_of(batch)
    inputs = {
        key: value.repeat(len(experts), *[1] * (value.dim() - 1)) if _is_by_row(value, num_rows) else value
        for key, value in right_aligned(batch).items()
    }
    return _run(model, inputs, [expert for expert in experts for _ in range(num_rows)]).view(len(experts), num_rows)


def _run(model: ExpertModel, inputs: Mapping[str, Any], experts: list[int]) -> Tensor:
    """The reward of each row from its expert, in fp32 or better."""
    logits_B1: Tensor = model(**without_cache(model.base_model, inputs), task=experts).logits
    return logits_B1.to(torch.promote_types(logits_B1.dtype, torch.float32))[:, 0]


def _is_by_row(value: Any, num_rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_rows


def _require_reward_model(model: ExpertModel) -> None:
    require_expert_model(model, "a reward ensemble")
    base: Any = model.base_model
    if getattr(base.config, "num_labels", None) != 1 or base.can_generate():
        raise CompositionError(
            f"{type(base).__name__} has no head that gives one reward: load it as a sequence classifier with num_labels=1"
        )


def _pairs_by_expert(model: ExpertModel, pairs: Pairs | Mapping[str, Pairs]) -> list[Pairs]:
    """The pairs of each expert, in the order of the model's tasks."""
    own = pairs if isinstance(pairs, Mapping) else dict.fromkeys(model.tasks, pairs)
    for task in own:
        if task not in model.tasks:
            known = ", ".join(map(repr, model.tasks))
            raise UnknownName(
                f"recipe {model.recipe.name!r} has no task {task!r}{nearest(task, model.tasks)}; it has {known}"
            )
    for task in model.tasks:
        if task not in own:
            raise TrainingError(
                f"task {task!r} has no pairs to learn from: give {{task: pairs}} for every task, or one list for all"
            )
        require_pairs(own[task])
    return [own[task] for task in model.tasks]


def _tokens(model: ExpertModel, by_expert: Sequence[Pairs]) -> dict[str, list[int]]:
    """The token ids of every text."""
    if model.tokenizer is None:
        raise CompositionError("texts need a tokenizer: make the expert model with tokenizer=...")
    texts = list(dict.fromkeys(text for pairs in by_expert for pair in pairs for text in pair))
    tokens = {text: list(ids) for text, ids in zip(texts, model.tokenizer(texts)["input_ids"], strict=True)}
    for text, ids in tokens.items():
        if not ids:
            raise InvalidTask(f"text {text!r} has no tokens")
    return tokens
