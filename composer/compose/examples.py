"""The rows of a task's examples, tokenised once, as batches for any selection; as trees where the model takes these.

A decoder whose attention takes any mask and any positions then gives each row the result that it has alone, for fewer
tokens: an instruction is read once for all examples, and a prompt once for all labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loraweave.common.chat import Prompt
from loraweave.common.names import text_digest
from loraweave.composer.compose.objectives._row_sums import Kind
from loraweave.composer.model.batches import (
    IGNORED,
    EncodedRow,
    TargetBatch,
    batch,
    encode,
    logits_at,
    mean_losses,
    takes,
    target_logits,
    untouched,
)
from loraweave.types import Task, with_pairs

# what a function as the objective is called with, beside the model
Examples = list[tuple[Prompt, str]]
# tokens of the texts of one tree, whose mask has as many rows and columns
MAX_TREE = 2048


@dataclass(frozen=True, eq=False)
class JobBatch:
    """One batch for several jobs, each a selection of examples; job j has the next rows_of_job[j] rows of the batch.

    slot_BRK is the place of each target token's logits among those kept of a batch row, counted from the last one (-1)
    backwards. target_BRK is `IGNORED` after the end of a target; real_BR is True for the text rows that a batch row has.
    """

    inputs: dict[str, Tensor]
    num_kept: int
    slot_BRK: Tensor
    target_BRK: Tensor
    real_BR: Tensor
    rows_of_job: tuple[int, ...]

    def logits(self, model: Any) -> Tensor:
        """Return logits_BPV of the positions that predict targets."""
        if self.inputs["attention_mask"].ndim != 4:
            return target_logits(model, TargetBatch(self.inputs, self.target_BRK[:, 0]))
        return tree_logits(model, self.inputs, self.num_kept)


def in_turn(task: Task) -> list[Task]:
    """Return a task for each example that shows the demonstrations before it or those after it, whichever are more.

    Those after it are shown in reverse. Such prompts continue each other, so that a tree reads the demonstrations twice, not
    once for each example. An example that is not a demonstration is asked after all of them.
    """
    shown, tasks = task.shown, []
    for pair in task.examples:
        place = shown.index(pair) if pair in shown else len(shown)
        before, after = shown[:place], shown[place + 1 :]
        tasks.append(with_pairs(task, demonstrations=before if len(before) >= len(after) else after[::-1]))
    return tasks


class EncodedExamples:
    """The rows of a task's examples, tokenised on first use: one for each text that the loss reads after a prompt.

    Without `trees`, rows never share a token tree. With `turned`, each example has the prompt that `in_turn` gives it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, task: Task, kind: Kind, *, trees: bool = True, turned: bool = False
    ) -> None:
        self._model, self._tokenizer, self._task, self._kind, self._turned = model, tokenizer, task, kind, turned
        # whether rows are run as trees; unknown before `prepare`
        self._shares = None if trees else False
        self.num_texts = len(kind.targets[0])
        self.right_N = torch.tensor(kind.right)
        self._trees: dict[tuple[int, ...], list[TokenTree]] = {}

    @cached_property
    def _rows(self) -> list[EncodedRow]:
        """The rows of all examples, tokenised on first use."""
        task = self._task
        tasks = in_turn(task) if self._turned else [task] * len(task.examples)
        prompts, targets = list[Prompt](), list[str]()
        for example_task, (text, _), texts in zip(tasks, task.examples, self._kind.targets, strict=True):
            prompts += [example_task.prompt(text)] * len(texts)
            targets += texts
        return encode(self._model, self._tokenizer, prompts, targets, ends=[task.answer_end] * len(targets))

    @cached_property
    def count_NR(self) -> Tensor:
        """The number of target tokens of each row, of R rows for each of N examples."""
        return torch.tensor([len(row.target) for row in self._rows]).view(-1, self.num_texts)

    @cached_property
    def _plain(self) -> TargetBatch:
        return batch(self._model, self._tokenizer, self._rows)

    def prepare(self) -> None:
        """Decide whether rows run as trees, which may run the model. Call it while no mixture is active."""
        if self._shares is None:
            self._shares = runs_trees(self._model, self._tokenizer, self._rows)

    def digest(self, examples: Sequence[int]) -> str:
        """Return a hash of the examples' tokens, and of the index of each example's target among its texts."""
        rows = [(row.prompt, row.target) for row in self._rows_of(examples)]
        return text_digest(repr((rows, self.right_N[list(examples)].tolist())))

    def num_targets(self, examples: Sequence[int]) -> int:
        """Return the number of tokens of the examples' own targets."""
        places = list(examples)
        return int(self.count_NR[places].gather(1, self.right_N[places][:, None]).sum())

    def size(self, examples: tuple[int, ...]) -> tuple[int, int]:
        """Return the numbers of tokens, and of logits over the vocabulary, in the forward pass of one job."""
        if trees := self.trees_of(examples):
            longest, kept = max(map(len, trees)), max(tree.num_predictors for tree in trees)
            return len(trees) * longest, len(trees) * kept
        rows = self._rows_of(examples)
        return len(rows) * max(map(len, rows)), len(rows) * max(len(row.target) for row in rows)

    def batch(self, jobs: Sequence[tuple[int, ...]]) -> JobBatch:
        """Return all jobs as one batch, of trees where the first job has trees."""
        if self.trees_of(jobs[0]):
            trees_by_job = [self.trees_of(job) for job in jobs]
            trees = [tree for job_trees in trees_by_job for tree in job_trees]
            sizes = [(*tree.target_RK.shape, tree.num_predictors) for tree in trees]
            num_rows, num_targets, num_kept = map(max, zip(*sizes, strict=True))
            slot_BRK = torch.full((len(trees), num_rows, num_targets), -1)
            target_BRK = torch.full_like(slot_BRK, IGNORED)
            for number, tree in enumerate(trees):
                place = number, slice(tree.target_RK.shape[0]), slice(tree.target_RK.shape[1])
                slot_BRK[place], target_BRK[place] = tree.slot_RK, tree.target_RK
            inputs = tree_inputs(self._model, trees)
            device = inputs["input_ids"].device
            slot_BRK, target_BRK = slot_BRK.to(device), target_BRK.to(device)
            real_BR = (target_BRK != IGNORED).any(dim=2)
            return JobBatch(inputs, num_kept, slot_BRK, target_BRK, real_BR, tuple(map(len, trees_by_job)))
        width = self.num_texts
        chosen = self._plain.rows([example * width + at for job in jobs for example in job for at in range(width)])
        target_BRK = chosen.targets_BK[:, None]
        num_kept, device = target_BRK.shape[2], target_BRK.device
        slot_BRK = torch.arange(-num_kept, 0, device=device).expand(target_BRK.shape)
        real_BR = torch.ones(target_BRK.shape[:2], dtype=torch.bool, device=device)
        rows_of_job = tuple(len(job) * width for job in jobs)
        return JobBatch(chosen.inputs, num_kept, slot_BRK, target_BRK, real_BR, rows_of_job)

    def trees_of(self, examples: tuple[int, ...]) -> list[TokenTree]:
        """Return the trees of a job, one per row of the batch; [] if plain rows cost less.

        The cost counts the products of a decoder layer of hidden size h, in units of 2 h: 12 h^2 for a token's weights, and
        2 h for each token of the row that it meets in attention, whether it sees it or not.
        """
        if (known := self._trees.get(examples)) is not None:
            return known
        self.prepare()
        best: list[TokenTree] = []
        size = 0
        if self._shares:
            rows = self._rows_of(examples)
            longest = max(map(len, rows))
            weights = 6 * int(self._model.config.get_text_config().hidden_size)
            least = len(rows) * longest * (weights + longest)
            size = min(len(examples), max(1, MAX_TREE // (self.num_texts * longest)))
        # smaller trees read more tokens in all, and each token meets fewer
        while size:
            groups = [examples[start : start + size] for start in range(0, len(examples), size)]
            trees = [token_tree(self._rows_of(group)) for group in groups]
            longest = max(map(len, trees))
            cost = len(trees) * longest * (weights + longest)
            if cost < least:
                best, least = trees, cost
            size = 0 if size == 1 else (size + 1) // 2
        self._trees[examples] = best
        return best

    def _rows_of(self, examples: Sequence[int]) -> list[EncodedRow]:
        width = self.num_texts
        return [row for example in examples for row in self._rows[example * width : (example + 1) * width]]


@dataclass(frozen=True, eq=False)
class TokenTree:
    """The tokens of R rows, common beginnings only once; the last `num_predictors` tokens are those that predict a target.

    sees_TT[i, j] is True if token j is token i, or one of its ancestors. slot_RK has the predictor of each target token,
    counted from the last one (-1) backwards; target_RK is `IGNORED` where a row's target is shorter than K.
    """

    ids_T: Tensor
    position_T: Tensor
    sees_TT: Tensor
    num_predictors: int
    slot_RK: Tensor
    target_RK: Tensor

    def __len__(self) -> int:
        return self.ids_T.shape[0]

    def read(self, logits_PV: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss_R, hit_R): the mean loss of each row's target, and whether greedy decoding would write it."""
        logs_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32)).log_softmax(dim=1)
        slot_RK, target_RK = self.slot_RK.to(logs_PV.device), self.target_RK.to(logs_PV.device)
        real_RK = target_RK >= 0
        loss_RK = -logs_PV[slot_RK, target_RK.clamp(min=0)].masked_fill(~real_RK, 0.0)
        hit_R = ((logs_PV.argmax(dim=1)[slot_RK] == target_RK) | ~real_RK).all(dim=1)
        return loss_RK.sum(dim=1) / real_RK.sum(dim=1), hit_R


def token_tree(rows: Sequence[EncodedRow]) -> TokenTree:
    """Merge rows, each with a prompt, into a tree of common beginnings, without their last tokens, which predict nothing."""
    nodes: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    paths: list[list[int]] = []
    predictors: set[int] = set()
    for row in rows:
        path, node = [], -1
        for token in (row.prompt + row.target)[:-1]:
            node = nodes.setdefault((node, token), len(ids))
            if node == len(ids):
                ids.append(token)
            path.append(node)
        paths.append(path)
        predictors.update(path[len(row.prompt) - 1 :])
    size, width = len(ids), max(len(row.target) for row in rows)
    order_T = torch.tensor([*sorted(set(range(size)) - predictors), *sorted(predictors)])
    place_T = torch.empty_like(order_T)
    place_T[order_T] = torch.arange(size)
    position_T = torch.zeros(size, dtype=torch.long)
    sees_TT = torch.zeros(size, size, dtype=torch.bool)
    slot_RK, target_RK = torch.full((len(rows), width), -1), torch.full((len(rows), width), IGNORED)
    for number, (row, path) in enumerate(zip(rows, paths, strict=True)):
        placed_L = place_T[path]
        position_T[placed_L] = torch.arange(len(path))
        # each token of the row sees itself and the row's tokens before it
        sees_TT[placed_L[:, None], placed_L] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        slot_RK[number, : len(row.target)] = placed_L[len(row.prompt) - 1 :] - size
        target_RK[number, : len(row.target)] = torch.tensor(row.target)
    return TokenTree(torch.tensor(ids)[order_T], position_T, sees_TT, len(predictors), slot_RK, target_RK)


def tree_logits(model: Any, inputs: dict[str, Tensor], num_kept: int) -> Tensor:
    """Return logits_BPV at the last `num_kept` tokens of trees, which include all tokens that predict a target."""
    # in a tree the last token predicts too, in a plain row it is predicted
    ids_BT = inputs["input_ids"]
    return logits_at(model, inputs, torch.arange(ids_BT.shape[1] - num_kept, ids_BT.shape[1], device=ids_BT.device))


def tree_inputs(model: nn.Module, trees: Sequence[TokenTree]) -> dict[str, Tensor]:
    """Return one row of a batch for each tree, padded on the left, with an additive attention mask of four axes."""
    dtype, device = _dtype(model), next(model.parameters()).device
    longest = max(map(len, trees))
    ids_BT = torch.zeros(len(trees), longest, dtype=torch.long)
    position_BT = torch.zeros(len(trees), longest, dtype=torch.long)
    # padding sees itself, since a softmax over nothing is NaN
    sees_BTT = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1)
    for number, tree in enumerate(trees):
        start = longest - len(tree)
        ids_BT[number, start:] = tree.ids_T
        position_BT[number, start:] = tree.position_T
        sees_BTT[number, start:, start:] = tree.sees_TT
    mask_BTT = torch.zeros(sees_BTT.shape, dtype=dtype).masked_fill_(~sees_BTT, torch.finfo(dtype).min)
    inputs = {"input_ids": ids_BT, "position_ids": position_BT, "attention_mask": mask_BTT[:, None]}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


# settings of models whose attention sees less than the whole row, by masks of their own
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window")
MASKED = ("eager", "sdpa")
NUM_TRIED = 4
# {model: {(attention, dtype): whether rows had the same losses in a tree when this was tried}}; windows are checked apart
_TRIED: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype], bool]] = WeakKeyDictionary()


def runs_trees(model: Any, tokenizer: Any, rows: Sequence[EncodedRow]) -> bool:
    """Return True if the model, as it is, gives rows the same losses in a tree as alone, to rounding; a few rows are tried.

    Returns False, without a trial, for encoder-decoders, for models that take no positions (recurrent ones, ALiBi), for
    attention that takes no mask of four axes, and for windows that are shorter than the longest row.
    """
    config = model.config
    if config.is_encoder_decoder or not takes(model, "position_ids") or not all(row.prompt for row in rows):
        return False
    longest = max(map(len, rows))
    text = config.get_text_config()
    if any(isinstance(window := getattr(text, name, None), int) and window < longest for name in WINDOWS):
        return False
    attention = getattr(config, "_attn_implementation", None)
    if attention not in MASKED:
        return False
    known = _TRIED.setdefault(model, {})
    key = str(attention), _dtype(model)
    if key not in known:
        known[key] = _are_alike(model, tokenizer, rows)
    return known[key]


def _are_alike(model: nn.Module, tokenizer: Any, rows: Sequence[EncodedRow]) -> bool:
    # distinct rows, from the shortest to the longest
    distinct = sorted(dict.fromkeys(rows), key=len)
    step = max(1, (len(distinct) - 1) / (NUM_TRIED - 1))
    tried = [distinct[int(number * step)] for number in range(min(NUM_TRIED, len(distinct)))]
    tree = token_tree(tried)
    with untouched(model), torch.no_grad():
        apart_B = mean_losses(model, batch(model, tokenizer, tried)).double()
        try:
            logits_PV = tree_logits(model, tree_inputs(model, [tree]), tree.num_predictors)[0]
        # whatever a model raises for a mask it did not expect
        except Exception:
            return False
    together_B = tree.read(logits_PV)[0].double()
    tolerance = 1e-4 if torch.finfo(_dtype(model)).bits >= 32 else 5e-2
    return bool(((together_B - apart_B).abs() <= tolerance * apart_B.abs().clamp(min=1.0)).all())


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
