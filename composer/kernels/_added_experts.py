"""The sum of trained experts' updates by the way that takes least, all of which make the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraweave.composer.kernels._chosen_product import ChosenProduct
from loraweave.composer.kernels._cost import TokenWorkload, choosing_pays, gathering_pays
from loraweave.composer.kernels._expert_product import ExpertProduct, RankRows, plain_product


def added_experts(
    y: Tensor | None,
    x_NI: Tensor,
    w_NE: Tensor,
    a: Tensor,
    b: Tensor,
    rows: RankRows,
    *,
    ranks: Sequence[int],
    most: int,
) -> Tensor:
    """y + (x a^T * w) b^T, in y's own memory, with the gradients of whatever learns; without y the update_NO.

    `ranks` are the experts'. A `most` below their number says that no token has more weights other than 0, and that a weight
    of 0 has no gradient.
    """
    learns = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (y, x_NI, w_NE, a, b))
    own_rows = rows.a_row_S is None and rows.b_row_S is None
    if most < len(ranks) and own_rows and len(w_NE) == len(x_NI) and x_NI.device.type == "cpu":
        work = TokenWorkload(
            num_tokens=len(x_NI),
            chosen=len(x_NI) * most,
            num_experts=len(ranks),
            stacked=len(a),
            num_inputs=a.shape[1],
            num_outputs=b.shape[1],
            itemsize=a.element_size(),
        )
        if len(x_NI) == 1 and not learns and gathering_pays(work):
            some_S = w_NE[0].index_select(0, rows.owner_S).nonzero()[:, 0]
            return plain_product(y, x_NI, w_NE, a[some_S], b[some_S], RankRows(rows.owner_S[some_S]))
        if choosing_pays(work, learns=learns):
            found: Tensor = ChosenProduct.apply(y, x_NI, w_NE, a, b, tuple(ranks))  # type: ignore[no-untyped-call]
            return found
    if not learns:
        return plain_product(y, x_NI, w_NE, a, b, rows)
    made: Tensor = ExpertProduct.apply(y, x_NI, w_NE, a, b, rows)  # type: ignore[no-untyped-call]
    return made
