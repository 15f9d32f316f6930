"""An adapter's answers in its old base, and the training of a carried adapter on them in the new one, without labels.

The loss is how far the predictions at an answer's tokens are from the old base's (Hinton et al. 2015, arXiv 1503.02531, at
temperature 1), on the likeliest tokens and one class of all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import eq
from typing import Any, TypeVar

import torch
from torch import Tensor

from loraweave import Adapter, BaseModelMismatch, Composer, InvalidTask, TrainingError
from loraweave.extend import fingerprint, progress_bar, tracked
from loraweave.extend.routing import has_two_sequences
from loraweave.extend.scoring import (
    IGNORED,
    Asked,
    EncodedRow,
    TargetBatch,
    batch,
    end_tokens,
    generation_call,
    in_chunks,
    read_prompt,
    target_logits,
    untouched,
)
from loraweave.extend.training import Apart, HeldOut, JobKind, LoraSettings, SharedTraining, require_startable

AskedT = TypeVar("AskedT", bound=Asked)
# the largest number of tokens of an answer
MAX_ANSWER = 24
# prompts that are answered together
BATCH_SIZE = 16
LR = 1e-3
# one of this many prompts judges, the others teach
JUDGED = 4
# the number of likeliest tokens whose probabilities are kept at each place of an answer
LIKELIEST = 64


def answers(
    model: Any,
    adapter: Adapter,
    tokenizer: Any,
    prompts: Sequence[Asked],
    *,
    taught: bool = False,
    progress: bool = False,
) -> list[EncodedRow]:
    """Return the tokens of each prompt and of its greedy answer under the adapter: at most MAX_ANSWER, with the end token.

    With `taught`, returns TaughtRows, which also have the model's predictions at the answer's tokens.
    """
    read_prompts = [read_prompt(prompt, number) for number, prompt in enumerate(prompts)]
    parts = in_chunks(read_prompts, BATCH_SIZE)
    ends = set(end_tokens(model) or ())
    answered: list[EncodedRow] = []
    # an encoder-decoder's output begins with its decoder's start token
    first = 1 if has_two_sequences(model) else 0
    with untouched(model), Composer(model, [adapter], tokenizer=tokenizer).activate({adapter.name: 1.0}):
        for part in tracked(parts, f"answering in {model.name_or_path}", total=len(parts), shown=progress):
            settings = {"do_sample": False, "max_new_tokens": MAX_ANSWER}
            call = generation_call(model, tokenizer, part, None, settings)
            said = call.new_tokens(call.output(model))[:, first:].tolist()
            read = zip(call.arguments["input_ids"], call.arguments["attention_mask"].bool(), strict=True)
            rows = []
            for (ids_T, mask_T), tokens in zip(read, said, strict=True):
                # after the first end token is the batch's padding
                length = next((place for place, token in enumerate(tokens, start=1) if token in ends), len(tokens))
                rows.append(EncodedRow(tuple(ids_T[mask_T].tolist()), tuple(tokens[:length])))
            answered += taught_by(model, tokenizer, rows) if taught else rows
    return answered


def agreement(tokenizer: Any, one: Sequence[EncodedRow], other: Sequence[EncodedRow]) -> float:
    """Return the share of rows, 0 to 1, whose answers are the same text in both lists."""
    texts = [[tokenizer.decode(row.target, skip_special_tokens=True) for row in rows] for rows in (one, other)]
    same: int = sum(map(eq, *texts))
    return same / len(one)


def split(prompts: Sequence[AskedT]) -> tuple[list[AskedT], list[AskedT]]:
    """Return (prompts that teach, prompts that judge): every fourth judges; prompts equal to a judging one never teach."""
    judges = list(prompts[::JUDGED])
    lessons = [prompt for place, prompt in enumerate(prompts) if place % JUDGED and prompt not in judges]
    if not lessons:
        raise InvalidTask(
            f"of {len(prompts)} prompts none is left to learn from, since each fourth judges: give at least 2 that differ"
        )
    return lessons, judges


@dataclass(frozen=True)
class Learning:
    """The settings of training: `steps` of up to `batch_size` answers, at a rate falling from `lr` to 0 as half a cosine."""

    steps: int
    lr: float
    seed: int
    batch_size: int = 8


def learned(
    carried: Adapter,
    model: Any,
    tokenizer: Any,
    lessons: Sequence[EncodedRow],
    judges: Sequence[EncodedRow],
    how: Learning,
    *,
    progress: bool,
) -> tuple[Adapter, dict[str, Any]]:
    """Return the adapter trained on the lessons in the new base, and an entry for its card.

    The loss is the mean over the answers' tokens of the divergence of the new base's prediction from the old one's; the
    entry's `loss` has the loss of the rows that judge, before and after. If it is not lower after, the carried adapter is
    returned unchanged, and the entry says `rolled_back`. Raises TrainingError for a loss that is not finite,
    BaseModelMismatch for answers with tokens that the new base does not have, AdapterUnsupported for more than a and b.
    """
    name, size = carried.name, model.get_input_embeddings().num_embeddings
    if (highest := max(max(row.prompt + row.target) for row in (*lessons, *judges))) >= size:
        raise BaseModelMismatch(f"the old base's answers have token {highest}, but the new base's vocabulary has {size}")
    rows_each = min(how.batch_size, len(lessons))
    settings = LoraSettings(how.steps, how.lr, rows_each, how.seed, warmup=0, rank=carried.rank, alpha=2.0 * carried.rank)
    begins, held_out = require_startable(model, [name], {name: carried}), {name: HeldOut(judges, every=how.steps)}
    with untouched(model), progress_bar(progress, field="loss") as bar:
        shared = SharedTraining(model, tokenizer, bar, jobs_per_batch=1, memory_bytes=None, folder=None)
        kind, base = JobKind(), fingerprint(model)
        trained = Apart(shared, settings, {}, {name: ()}, {name: lessons}, held_out, begins, kind, base).train()
    (_, before), (_, after) = trained.report.jobs[name].held_out
    if not math.isfinite(after):
        raise TrainingError(
            f"after {how.steps} steps in the new base the loss of adapter {name!r} is {after}: lower lr={how.lr:g}"
        )
    about = {"steps": how.steps, "prompts": len(lessons), "judges": len(judges), "loss": [before, after]}
    if after >= before:
        return carried, {**about, "rolled_back": True}
    return replace(carried, layers=trained[name].layers), {**about, "rolled_back": False}


@dataclass(frozen=True, eq=False)
class TaughtRow(EncodedRow):
    """A row with the teacher's M likeliest tokens at each of the target's K tokens, and their probabilities.

    ids_KM are token ids, p_KN has N = M + 1 values in fp32 that sum to 1, the last that of all other tokens.
    """

    ids_KM: Tensor
    p_KN: Tensor

    @staticmethod
    def losses(model: Any, rows: Sequence[TaughtRow], stacked: TargetBatch) -> Tensor:
        """Return loss_BK = KL(teacher || model) at each token, in nats, fp32; 0 where a target is shorter than K."""
        asked_BK = stacked.targets_BK != IGNORED
        logits_NV = target_logits(model, stacked)[asked_BK]
        ids_NM, p_NN = (
            torch.cat(parts).to(logits_NV.device) for parts in zip(*((r.ids_KM, r.p_KN) for r in rows), strict=True)
        )
        loss_N = (torch.xlogy(p_NN, p_NN) - p_NN * _log_shares(logits_NV, ids_NM)).sum(dim=1)
        return loss_N.new_zeros(asked_BK.shape).masked_scatter(asked_BK, loss_N)


@torch.no_grad()
def taught_by(model: Any, tokenizer: Any, rows: Sequence[EncodedRow]) -> list[TaughtRow]:
    """Return the rows with the model's predictions for their targets."""
    taught: list[TaughtRow] = []
    for part in in_chunks(list(rows), BATCH_SIZE):
        stacked = batch(model, tokenizer, part)
        logits_NV = target_logits(model, stacked)[stacked.targets_BK != IGNORED]
        ids_NM = logits_NV.topk(min(LIKELIEST, logits_NV.shape[1]), dim=1).indices
        log_p_NN = _log_shares(logits_NV, ids_NM)
        counts = [len(row.target) for row in part]
        pairs = zip(part, torch.split(ids_NM.cpu(), counts), torch.split(log_p_NN.exp().cpu(), counts), strict=True)
        taught += [TaughtRow(row.prompt, row.target, ids_KM, p_KN) for row, ids_KM, p_KN in pairs]
    return taught


def _log_shares(logits_NV: Tensor, ids_NM: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens `ids_NM`, then of all other tokens together, in fp32 (N, M + 1)."""
    log_p_NM = logits_NV.float().log_softmax(dim=1).gather(1, ids_NM)
    # rounding can make the sum 1 or more, whose log(1 - sum) is undefined
    named_N1 = log_p_NM.exp().sum(dim=1, keepdim=True).clamp(max=1 - torch.finfo(torch.float32).eps)
    return torch.cat([log_p_NM, torch.log1p(-named_N1)], dim=1)
