"""Rows of tokens as one tree: what several of them begin with is read once, and every token sees its ancestors alone.

A decoder whose attention takes any mask and any positions then gives each row what it gives it alone, for fewer tokens: an
instruction is read once for all examples, and a prompt once for all labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.composer.batches import IGNORED, EncodedRow


@dataclass(frozen=True, eq=False)
class TokenTree:
    """The tokens that a model has to read of R rows; the last `num_predictors` of them are those that predict a target.

    sees_TT says which tokens are a token's ancestors, or itself. slot_RK has the predictor of each target token, counted
    from the last one (-1) backwards; target_RK is `IGNORED` where a row's target is shorter than K.
    """

    ids_T: Tensor
    position_T: Tensor
    sees_TT: Tensor
    num_predictors: int
    slot_RK: Tensor
    target_RK: Tensor

    def __len__(self) -> int:
        return self.ids_T.shape[0]


def token_tree(rows: Sequence[EncodedRow]) -> TokenTree:
    """The tree of rows that each have a prompt. A row's last token predicts nothing, and is left out."""
    nodes: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    paths: list[list[int]] = []
    for row in rows:
        path = [-1]
        for token in (row.prompt + row.target)[:-1]:
            node = nodes.setdefault((path[-1], token), len(ids))
            if node == len(ids):
                ids.append(token)
            path.append(node)
        paths.append(path[1:])
    predictors = {node for row, path in zip(rows, paths, strict=True) for node in path[len(row.prompt) - 1 :]}
    order = sorted(range(len(ids)), key=lambda node: (node in predictors, node))
    place = {node: number for number, node in enumerate(order)}
    position_T = torch.zeros(len(ids), dtype=torch.long)
    sees_TT = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    width = max(len(row.target) for row in rows)
    slot_RK = torch.full((len(rows), width), -1)
    target_RK = torch.full((len(rows), width), IGNORED)
    for number, (row, path) in enumerate(zip(rows, paths, strict=True)):
        placed_L = torch.tensor([place[node] for node in path])
        position_T[placed_L] = torch.arange(len(path))
        # of the row's tokens, each sees those before it
        sees_TT[placed_L[:, None], placed_L] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        slot_RK[number, : len(row.target)] = placed_L[len(row.prompt) - 1 :] - len(ids)
        target_RK[number, : len(row.target)] = torch.tensor(row.target)
    ids_T = torch.tensor([ids[node] for node in order])
    return TokenTree(ids_T, position_T, sees_TT, len(predictors), slot_RK, target_RK)


def tree_inputs(trees: Sequence[TokenTree], pad: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """One row of a batch for each tree, padded on the left, with a mask of four axes that is added to the scores."""
    longest = max(len(tree) for tree in trees)
    ids_BT = torch.full((len(trees), longest), pad)
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
