"""A model's answers and their scores: ranked labels, the first line of a greedy generation, and Wilson's intervals."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraweave.common.chat import Conversation, Prompt, answered_ids, prompt_ids, turn_end
from loraweave.common.rows import GivenRows, read_rows
from loraweave.composer.model.batches import (
    IGNORED,
    EncodedRow,
    Prefixes,
    TargetBatch,
    answer_ids,
    batch,
    cache_name,
    context_length,
    encode,
    end_tokens,
    following,
    in_chunks,
    last_logits,
    losses_of,
    mean_losses,
    pad_id,
    pad_rows,
    token_losses,
    with_positions,
)
from loraweave.errors import InvalidTask
from loraweave.retrieval.fusion import wilson
from loraweave.routers.tokens._call import prompted
from loraweave.types import LINE, Task

BATCH_SIZE = 32
MAX_NEW_TOKENS = 48

Targets = str | Sequence[str]


@dataclass(frozen=True)
class Score:
    """The share of right answers (0 to 1) with its 95 % interval (Wilson), and the mean loss of the targets in nats.

    `count` is the number of items; `right`, `answers` and `losses` have an entry for each.
    """

    value: float
    low: float
    high: float
    loss: float
    count: int
    right: tuple[bool, ...]
    answers: tuple[str, ...]
    losses: tuple[float, ...]

    def figures(self) -> dict[str, float]:
        """Return all figures but those of single items."""
        return {name: getattr(self, name) for name in ("value", "low", "high", "loss", "count")}


def losses(
    model: Any, tokenizer: Any, task: Task, pairs: Sequence[tuple[Prompt, Targets]], *, share: bool = False
) -> list[float]:
    """Return the mean negative log-likelihood of each pair's (first) target, given its prompt.

    Demonstrations keep their first order. With `share` a beginning that all prompts share is read once.
    """
    return losses_of_rows(model, tokenizer, encode_pairs(model, tokenizer, task, pairs), share=share)


def encode_pairs(model: Any, tokenizer: Any, task: Task, pairs: Sequence[tuple[Prompt, Targets]]) -> list[EncodedRow]:
    """Return the token ids of each pair's prompt and (first) target."""
    targets = [accepted if isinstance(accepted, str) else accepted[0] for _, accepted in pairs]
    return encode(model, tokenizer, [task.prompt(text) for text, _ in pairs], targets, ends=[task.answer_end] * len(pairs))


@torch.no_grad()
def losses_of_rows(model: Any, tokenizer: Any, rows: Sequence[EncodedRow], *, share: bool = False) -> list[float]:
    """Return the mean negative log-likelihood of each row's target; with `share` a common beginning is read once."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    values = [0.0] * len(rows)
    prefix = Prefixes.of(model, tokenizer, [[row.prompt for row in rows]]) if share else None
    for chunk in in_chunks(order, BATCH_SIZE):
        stacked = batch(model, tokenizer, [rows[i] for i in chunk])
        if prefix is not None:
            whole = [rows[i].prompt + rows[i].target for i in chunk]
            stacked = TargetBatch(prefix.after(model, tokenizer, whole), stacked.targets_BK)
        for index, loss in zip(chunk, mean_losses(model, stacked), strict=True):
            values[index] = float(loss)
    return values


def predict(
    model: Any,
    tokenizer: Any,
    task: Task,
    inputs: Sequence[Prompt],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    share: bool = False,
) -> list[str]:
    """Return one answer for each input: the likeliest label if the task has labels, else the model's greedy answer.

    For a task in several orders of demonstrations the answer is that of `predict_together`. With `share` the model reads the
    common beginning of all prompts once, if possible; not for weights that depend on the whole prompt.
    """
    tasks = task.in_orders()
    share = share and bool(task.demonstrations)
    inputs_MN = [inputs] * len(tasks)
    return predict_together(
        model, tokenizer, tasks, equal_shares(len(tasks)), inputs_MN, max_new_tokens=max_new_tokens, share=share
    )


def equal_shares(count: int) -> Tensor:
    """Return share_M in fp64: equal shares, which sum to 1."""
    return torch.full((count,), 1 / count, dtype=torch.float64)


@torch.no_grad()
def predict_together(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    share_M: Tensor,
    inputs_MN: Sequence[Sequence[Prompt]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    share: bool = False,
) -> list[str]:
    """Return one answer for each of N inputs under the prompts of M tasks, whose probabilities are averaged.

    `inputs_MN` has each input's text for each task, share_M the tasks' weights in the average. A batch has the rows of the
    first task, then those of the next. Labels' probabilities are averaged, without the prior if the tasks are `calibrated`.
    Each step of decoding takes the token of the highest average for all rows of an input. `share` is as in `predict`.
    """
    labels, neutral = tasks[0].labels, tasks[0].neutral
    if labels is not None:
        log_p_MNL = _label_scores_by_task(model, tokenizer, tasks, labels, inputs_MN, share)
        if neutral:
            # share no beginning: a neutral input that a prompt demonstrates gets that prompt without it
            neutral_texts = [text for text, _ in neutral]
            neutral_MCL = _label_scores_by_task(model, tokenizer, tasks, labels, [neutral_texts] * len(tasks), share)
            log_p_MNL = without_prior(log_p_MNL, log_prior(neutral_MCL, tasks[0]))
        return [labels[int(best)] for best in log_average(log_p_MNL, share_M).argmax(dim=1)]
    averaged = [AveragedScores(share_M)] if len(tasks) > 1 else []
    answers = [""] * len(inputs_MN[0])
    prefix, chunks = _batches(model, tokenizer, tasks, inputs_MN, BATCH_SIZE, share)
    for chosen, prompts in chunks:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "processors": averaged, "prefix": prefix}
        outputs = generate(model, tokenizer, prompts, stop=tasks[0].stops, **settings)
        for index, answer in zip(chosen, outputs, strict=False):
            answers[index] = answer
    return answers


def _label_scores_by_task(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    labels: Sequence[str],
    inputs_MN: Sequence[Sequence[Prompt]],
    share: bool,
) -> Tensor:
    """Return log p_MNL over the labels after each input in each task's prompt, float64 on the CPU."""
    ends = [task.answer_end for task in tasks]
    log_p_MNL = torch.zeros(len(tasks), len(inputs_MN[0]), len(labels), dtype=torch.float64)
    prefix, chunks = _batches(model, tokenizer, tasks, inputs_MN, 128 // len(labels), share)
    for chosen, prompts in chunks:
        found_NL = label_scores(model, tokenizer, prompts, labels, ends=ends, prefix=prefix).double().cpu()
        log_p_MNL[:, chosen] = found_NL.view(len(tasks), len(chosen), -1)
    return log_p_MNL


def _batches(
    model: Any, tokenizer: Any, tasks: Sequence[Task], inputs_MN: Sequence[Sequence[Prompt]], num_rows: int, share: bool
) -> tuple[Prefixes | None, list[tuple[list[int], list[Prompt]]]]:
    """Return the cached beginnings of prompts, or None, and batches of inputs of similar length, of at most `num_rows` rows.

    A batch is (indices of the inputs, their prompts), the prompts of one task after those of the other.
    """
    prompts_MN = [[task.prompt(text) for text in inputs_N] for task, inputs_N in zip(tasks, inputs_MN, strict=True)]
    ids_MN = [prompt_ids(tokenizer, prompts) for prompts in prompts_MN]
    by_length = sorted(range(len(ids_MN[0])), key=lambda index: len(ids_MN[0][index]))
    chunks = in_chunks(by_length, max(1, num_rows // len(tasks)))
    prefix = Prefixes.of(model, tokenizer, ids_MN) if share else None
    return prefix, [(chosen, [prompts[n] for prompts in prompts_MN for n in chosen]) for chosen in chunks]


def log_prior(log_p_MCL: Tensor, task: Task) -> Tensor:
    """Return log_prior_ML, each label's log-probability whatever the input, from the task's C neutral inputs.

    A label's prior is its mean log-probability over the neutral inputs whose known answer is another label: a model that has
    learned an example is sure of it, so that the label of most examples would seem likely for any input. A label that is the
    answer of all neutral inputs has the mean over all. With `calibrated=True` it is the logarithm of the mean probability.
    """
    if task.calibrated is True:
        return log_p_MCL.exp().mean(dim=1).log()
    other_CL = torch.tensor([[label != known for label in task.labels or ()] for _, known in task.neutral]).to(log_p_MCL)
    other_CL[:, other_CL.sum(dim=0) == 0] = 1
    return (log_p_MCL * other_CL).sum(dim=1) / other_CL.sum(dim=0)


def without_prior(log_p_MNL: Tensor, log_prior_ML: Tensor) -> Tensor:
    """Return the log of p / prior, scaled to sum 1 over the labels (Zhao et al. 2021, arXiv 2102.09690).

    It corrects for labels that a prompt makes likely whatever the input.
    """
    return (log_p_MNL - log_prior_ML[:, None]).log_softmax(dim=-1)


class AveragedScores:
    """A logits processor for greedy decoding that gives each row the log of the members' averaged probabilities.

    A member is a prompt or mixture for the same inputs; the rows of a batch are grouped by member. share_M sums to 1.
    """

    def __init__(self, share_M: Tensor) -> None:
        self.share_M = share_M

    def __call__(self, ids_NT: Tensor, scores_NV: Tensor) -> Tensor:
        scores_MBV = scores_NV.to(torch.promote_types(scores_NV.dtype, torch.float32)).log_softmax(dim=-1)
        average_BV = log_average(scores_MBV.view(len(self.share_M), -1, scores_NV.shape[-1]), self.share_M)
        return average_BV.repeat(len(self.share_M), 1)


def log_average(log_p_MBV: Tensor, share_M: Tensor) -> Tensor:
    """Return the log of sum over m of share_m p_m, (B, V)."""
    return torch.logsumexp(log_p_MBV + share_M.to(log_p_MBV).log()[:, None, None], dim=0)


def evaluate(model: Any, tokenizer: Any, task: Task, pairs: GivenRows, *, share: bool = False) -> Score:
    """Predict every input and compare with its accepted targets (one text, or several), after trimming white space.

    `pairs` are rows with input and target; `share` is that of `predict`.
    """
    pairs = read_answers(pairs)
    most = longest_answer(tokenizer, pairs)
    answers = predict(model, tokenizer, task, [text for text, _ in pairs], max_new_tokens=most, share=share)
    return score(answers, pairs, losses(model, tokenizer, task, pairs, share=share))


Pairs = Sequence[tuple[Prompt, Sequence[str]]]


def longest_answer(tokenizer: Any, pairs: Pairs) -> int:
    """Return the most tokens to generate for an answer.

    An answer twice as long as any accepted target is wrong however it ends, and the base model often does not stop.
    """
    targets = [target for _, accepted in pairs for target in accepted]
    longest = max(map(len, tokenizer(targets)["input_ids"]))
    return min(MAX_NEW_TOKENS, 2 * longest + 4)


def answer_limit(tokenizer: Any, examples: Sequence[tuple[Prompt, str]]) -> int:
    """Return the most tokens that a step's answer may have: as many as the examples' longest text, if there are any."""
    texts = [(prompt, (str(prompt), target)) for prompt, target in examples]
    return longest_answer(tokenizer, texts) if texts else MAX_NEW_TOKENS


def score(answers: Sequence[str], pairs: Pairs, losses: Sequence[float]) -> Score:
    """Return the score of one answer and one loss for each pair; white space around an answer is ignored."""
    right = tuple(a.strip() in [t.strip() for t in accepted] for a, (_, accepted) in zip(answers, pairs, strict=True))
    share = float(np.mean(right))
    low, high = wilson(share, len(right))
    return Score(share, low, high, float(np.mean(losses)), len(right), right, tuple(answers), tuple(losses))


def read_answers(rows: GivenRows) -> list[tuple[Prompt, tuple[str, ...]]]:
    """Return (input, accepted targets) of each row. Raises InvalidTask if there is none, or one without a target."""
    read = read_rows(rows, targets="several")
    if not read:
        raise InvalidTask("there are no rows to evaluate on: give (input, target) pairs")
    return [(row.asked, row.targets) for row in read]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    prefix: Prefixes | None = None,
    stop: Sequence[str] = LINE,
) -> list[str]:
    """Return the first line of each greedy continuation, or the text before the first of the texts in `stop`.

    In a conversation the end of the assistant's turn ends it too. `processors` change a step's scores before the best token
    is taken, as transformers' logits processors do. All prompts begin with the `prefix`, if there is one.
    """
    inputs, cache = _read_prompts(model, tokenizer, prompts, prefix)
    known: dict[str, Any] = {} if cache is None else {cache_name(model): cache}
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"] if tuple(stop) == LINE else ()
    chat = next((prompt for prompt in prompts if isinstance(prompt, Conversation)), None)
    of_turn = [] if chat is None else _turn_ends(model, tokenizer, chat)
    ends = sorted({tokenizer.eos_token_id, *(line_break if len(line_break) == 1 else ()), *of_turn} - {None})
    if stop and tuple(stop) != LINE:
        known |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    with warnings.catch_warnings():
        # a checkpoint's own sampling settings (temperature, top_p) are warned about in every greedy call
        warnings.filterwarnings("ignore", message=".*(do_sample|generation flags).*")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **last_logits(model),
            **known,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=ends,
            pad_token_id=pad_id(tokenizer),
            logits_processor=list(processors),
        )
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    return [answer_in(text, stop) for text in texts]


def answer_in(text: str, stop: Sequence[str]) -> str:
    """Return the first line of a continuation if `stop` is `LINE`, else the text before the first of the texts in `stop`."""
    if tuple(stop) == LINE:
        return (text.strip(" ").splitlines() or [""])[0].strip()
    return text[: min((place for end in stop if (place := text.find(end)) >= 0), default=None)].strip()


def _turn_ends(model: Any, tokenizer: Any, chat: Conversation) -> list[int]:
    """Return the tokens that end the assistant's turn: the model's end tokens, and the chat template's own."""
    end = turn_end(tokenizer, chat)
    first = tokenizer(end, add_special_tokens=False)["input_ids"][:1] if end else []
    # if a turn ends in words, their first token may also occur within the answer
    return [*(end_tokens(model) or ()), *(token for token in first if token in tokenizer.all_special_ids or not end.strip())]


def rank(model: Any, tokenizer: Any, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[str]:
    """Return the label of the highest summed log-likelihood after each prompt, the end-of-sequence token included."""
    return [labels[int(best)] for best in label_scores(model, tokenizer, prompts, labels).argmax(dim=1)]


def label_scores(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    *,
    ends: Sequence[str | None] = (None,),
    prefix: Prefixes | None = None,
) -> Tensor:
    """Return log p_NL over the labels after each prompt, by summed log-likelihoods with each label's end included.

    The prompts are in as many equal parts as there are `ends`; None is the end of sequence.
    """
    inputs, cache = _read_prompts(model, tokenizer, prompts, prefix)
    ids = [label_ids(tokenizer, labels, end) for end in ends]
    if any(isinstance(prompt, Conversation) for prompt in prompts):
        # a template may write a turn otherwise after another prompt
        group_size = len(prompts) // len(ends)
        ids = [
            [answered_ids(tokenizer, prompt, label)[1] for label in labels]
            if isinstance(prompt, Conversation)
            else ids[number // group_size]
            for number, prompt in enumerate(prompts)
        ]
    return (-label_losses(model, inputs["input_ids"], inputs["attention_mask"], ids, cache)).log_softmax(dim=1)


def label_ids(tokenizer: Any, labels: Sequence[str], end: str | None = None) -> list[list[int]]:
    """Return the token ids of " label" and `end`, None for the end of sequence. Raises InvalidTask for an empty label."""
    ids = answer_ids(tokenizer, labels, [end] * len(labels))
    for label, tokens in zip(labels, ids, strict=True):
        if not label.strip() or not tokens:
            raise InvalidTask(f"label {label!r} is empty; a label is the text of an answer")
    return ids


def label_losses(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, labels: Sequence[Sequence[Sequence[int]]], cache: Any = None
) -> Tensor:
    """Return loss_BL for L labels, the summed negative log-likelihood of each label's tokens after each prompt.

    The prompts are padded as `pad_prompts` does. `labels` has the token ids of each label for each of M equal parts of the
    batch. A decoder reads each prompt once; its labels share the prompt's keys and values, and the tokens in a `cache` are
    not read again. Raises InvalidTask for labels that lie beyond the model's context.
    """
    width = max(len(label) for part_labels in labels for label in part_labels)
    targets_MLK = [[[*label, *[IGNORED] * (width - len(label))] for label in part_labels] for part_labels in labels]
    rows_per_part = len(ids_BT) // len(labels)
    targets_NK = torch.tensor(targets_MLK, device=ids_BT.device).repeat_interleave(rows_per_part, dim=0).flatten(0, 1)
    limit, longest = context_length(model), int(mask_BT.sum(dim=1).max())
    if limit and longest + width > limit:
        raise InvalidTask(
            f"a prompt of {longest} tokens and a label of {width} exceed the model's context of {limit}; shorten them"
        )
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        inputs = {key: value.repeat_interleave(len(labels[0]), dim=0) for key, value in inputs.items()}
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(targets_NK)
        losses_NK = token_losses(model, TargetBatch(inputs, targets_NK))
    else:
        with prompted(ids_BT, mask_BT):
            losses_NK = _losses_after(model, ids_BT, mask_BT, targets_NK, cache)
    return losses_NK.sum(dim=1).view(len(ids_BT), -1)


def _losses_after(model: Any, ids_BT: Tensor, mask_BT: Tensor, targets_NK: Tensor, cache: Any) -> Tensor:
    """Return a decoder's loss_NK for N targets, N / B after each of B prompts, by one pass of prompts and one of targets."""
    count, width, name = len(targets_NK) // len(ids_BT), targets_NK.shape[1], cache_name(model)
    prompt_inputs = with_positions(model, ids_BT, mask_BT)
    if cache is not None:
        prompt_inputs = {**following(prompt_inputs, cache.get_seq_length()), name: cache}
    first = model(**prompt_inputs, **last_logits(model), use_cache=True)
    cache = first[name]
    cache.batch_repeat_interleave(count)
    real_NK = targets_NK != IGNORED
    mask_NT = torch.cat([mask_BT.repeat_interleave(count, dim=0), real_NK.to(mask_BT.dtype)], dim=1)
    inputs = with_positions(model, targets_NK.clamp(min=0), mask_NT)
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"][:, -width:]
    rest_NKV = model(**inputs, **{name: cache}, use_cache=True).logits
    logits_NKV = torch.cat([first.logits[:, -1:].repeat_interleave(count, dim=0), rest_NKV[:, :-1]], dim=1)
    return losses_of(logits_NKV, targets_NK)


def _read_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], prefix: Prefixes | None
) -> tuple[dict[str, Tensor], Any]:
    """Return one batch of the prompts, and the cache of the `prefix` by row, or None without a prefix."""
    if prefix is None:
        return pad_prompts(model, tokenizer, prompts), None
    return prefix.before(model, tokenizer, prompt_ids(tokenizer, prompts))


def pad_prompts(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Return the prompts as one batch on the model's device, padded left for a decoder and right for an encoder."""
    left, device = not model.config.is_encoder_decoder, next(model.parameters()).device
    ids, mask = pad_rows(tokenizer, prompt_ids(tokenizer, prompts), left=left)
    ids, mask = ids.to(device), mask.to(device)
    return with_positions(model, ids, mask) if left else {"input_ids": ids, "attention_mask": mask}
