"""Answers of a model and their scores: ranked labels, the first line of a greedy generation, intervals by bootstrap."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from loraweave.composer.batches import batch, encode, mean_losses, takes, token_losses, with_positions
from loraweave.errors import InvalidTask
from loraweave.types import Task

BATCH_SIZE = 32
MAX_NEW_TOKENS = 48
RESAMPLES = 2000

Targets = str | Sequence[str]


@dataclass(frozen=True)
class Score:
    """Share of right answers (0 to 1) with its 95 % bootstrap interval over items, and the mean loss of the targets."""

    value: float
    low: float
    high: float
    loss: float
    count: int
    right: tuple[bool, ...]


@torch.no_grad()
def losses(model: Any, tokenizer: Any, task: Task, pairs: Sequence[tuple[str, Targets]]) -> list[float]:
    """The mean negative log-likelihood of each pair's (first) target, given its prompt."""
    rows = encode(model, tokenizer, [task.prompt(text) for text, _ in pairs], [_accepted(t)[0] for _, t in pairs])
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    values = [0.0] * len(rows)
    for chunk in _chunks(order, BATCH_SIZE):
        for index, loss in zip(chunk, mean_losses(model, batch(model, tokenizer, [rows[i] for i in chunk])), strict=True):
            values[index] = float(loss)
    return values


@torch.no_grad()
def predict(
    model: Any, tokenizer: Any, task: Task, inputs: Sequence[str], *, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[str]:
    """One answer for each input: the likeliest label when the task has labels, else the first generated line."""
    prompts = [task.prompt(text) for text in inputs]
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]] if prompts else []
    order = sorted(range(len(prompts)), key=lambda index: lengths[index])
    answers = [""] * len(prompts)
    size = BATCH_SIZE if task.labels is None else max(1, 128 // len(task.labels))
    for chunk in _chunks(order, size):
        texts = [prompts[index] for index in chunk]
        if task.labels is None:
            found = generate(model, tokenizer, texts, max_new_tokens=max_new_tokens)
        else:
            found = rank(model, tokenizer, texts, task.labels)
        for index, answer in zip(chunk, found, strict=True):
            answers[index] = answer
    return answers


def evaluate(model: Any, tokenizer: Any, task: Task, pairs: Sequence[tuple[str, Targets]], *, seed: int = 0) -> Score:
    """Predicts every input and compares with its accepted targets (one text, or several), after trimming white space."""
    if not pairs:
        raise InvalidTask("no (input, target) pairs to evaluate on")
    # an answer twice as long as any accepted target is wrong however it ends, and the base model often goes on and on
    targets = [target for _, accepted in pairs for target in _accepted(accepted)]
    longest = max(len(ids) for ids in tokenizer(targets)["input_ids"])
    answers = predict(
        model, tokenizer, task, [text for text, _ in pairs], max_new_tokens=min(MAX_NEW_TOKENS, 2 * longest + 4)
    )
    right = tuple(a.strip() in [t.strip() for t in _accepted(t)] for a, (_, t) in zip(answers, pairs, strict=True))
    low, high = bootstrap(right, seed=seed)
    loss = float(np.mean(losses(model, tokenizer, task, pairs)))
    return Score(float(np.mean(right)), low, high, loss, len(right), right)


def bootstrap(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the mean over 2,000 resamples of the items."""
    generator = np.random.default_rng(seed)
    array = np.asarray(values, dtype=np.float64)
    means = array[generator.integers(0, len(array), size=(RESAMPLES, len(array)))].mean(axis=1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    """The first line of each greedy continuation; generation ends at a line break."""
    inputs = left_padded(model, tokenizer, prompts)
    ends = sorted({tokenizer.eos_token_id, *_line_breaks(tokenizer)} - {None})
    with warnings.catch_warnings():
        # a checkpoint's own sampling settings (temperature, top_p) are warned about in every greedy call
        warnings.filterwarnings("ignore", message=".*(do_sample|generation flags).*")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    return [(text.strip(" ").splitlines() or [""])[0].strip() for text in texts]


def rank(model: Any, tokenizer: Any, prompts: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The label of the highest summed log-likelihood after each prompt, the end-of-sequence token included.

    A decoder reads each prompt once; its labels share the prompt's keys and values.
    """
    if model.config.is_encoder_decoder:
        pairs = [(prompt, label) for prompt in prompts for label in labels]
        rows = encode(model, tokenizer, [prompt for prompt, _ in pairs], [label for _, label in pairs])
        sums_N = token_losses(model, batch(model, tokenizer, rows)).sum(dim=1)
    else:
        sums_N = _label_losses(model, tokenizer, prompts, labels)
    return [labels[int(best)] for best in sums_N.view(len(prompts), len(labels)).argmin(dim=1)]


def _label_losses(model: Any, tokenizer: Any, prompts: Sequence[str], labels: Sequence[str]) -> Tensor:
    rows = encode(model, tokenizer, [prompts[0]] * len(labels), labels)
    prefix = left_padded(model, tokenizer, prompts)
    prompt_mask_BT = prefix["attention_mask"]
    width = max(len(row.target) for row in rows)
    label_LK = torch.tensor([[*row.target, *[row.target[-1]] * (width - len(row.target))] for row in rows]).to(model.device)
    real_LK = torch.tensor([[1] * len(row.target) + [0] * (width - len(row.target)) for row in rows]).to(model.device)
    keep = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    first = model(**prefix, **keep, use_cache=True)
    count = len(prompts)
    # transformers 5.24 renamed the argument; the floor 5.3 has the old name
    name = "cache" if takes(model, "cache") else "past_key_values"
    cache = first[name]
    cache.batch_repeat_interleave(len(labels))
    label_NK, real_NK = label_LK.repeat(count, 1), real_LK.repeat(count, 1)
    mask_NT = torch.cat([prompt_mask_BT.repeat_interleave(len(labels), dim=0), real_NK], dim=1)
    inputs = with_positions(model, label_NK, mask_NT)
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"][:, -width:]
    rest_NKV = model(**inputs, **{name: cache}, use_cache=True).logits
    head_NKV = first.logits[:, -1:].repeat_interleave(len(labels), dim=0)
    logits_NKV = torch.cat([head_NKV, rest_NKV[:, :-1]], dim=1).float()
    losses_NK = functional.cross_entropy(logits_NKV.flatten(0, 1), label_NK.flatten(), reduction="none").view(label_NK.shape)
    return (losses_NK * real_NK).sum(dim=1)


def left_padded(model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts as one batch padded on the left, on the model's device."""
    side = tokenizer.padding_side
    try:
        tokenizer.padding_side = "left"
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = side
    device = next(model.parameters()).device
    ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    return (
        {"input_ids": ids, "attention_mask": mask} if model.config.is_encoder_decoder else with_positions(model, ids, mask)
    )


def _line_breaks(tokenizer: Any) -> list[int]:
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return ids if len(ids) == 1 else []


def _accepted(targets: Targets) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets)


def _chunks(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
