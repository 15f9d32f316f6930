"""Tokens, experts' weights and factors, and the formula of the sum of their updates."""

import torch

from loraweave.composer.live.kernels.dense import ExpertProduct, RankRows, add_experts

RANKS = (2, 3, 1, 2)
NAMES = ("x", "w", "a", "b")
# whether all experts share a, and b
SHARED = {"own": (False, False), "one a": (True, False), "one b": (False, True), "both": (True, True)}


class Example:
    """Seven tokens: the first chose none, and nobody chose expert 2. Every expert has rank 3 where some share a factor."""

    def __init__(self, form="own", *, one_row=False, num_tokens=7, all_chosen=False):
        self.shared_a, self.shared_b = SHARED[form]
        self.ranks = (3,) * len(RANKS) if self.shared_a or self.shared_b else RANKS
        num_ranks, count = sum(self.ranks), len(RANKS)
        own_row_S = torch.cat([torch.arange(rank) for rank in self.ranks])
        self.owner_S = torch.arange(count).repeat_interleave(torch.tensor(self.ranks))
        self.rows = RankRows(self.owner_S, own_row_S if self.shared_a else None, own_row_S if self.shared_b else None)
        sizes = {"x": (num_tokens, 5), "w": (1 if one_row else num_tokens, count)}
        sizes |= {"a": (3 if self.shared_a else num_ranks, 5), "b": (3 if self.shared_b else num_ranks, 4)}
        generator = torch.Generator().manual_seed(0)
        drawn = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
        self.x, self.w, self.a, self.b = drawn.values()
        if not all_chosen:
            chosen_NE = torch.rand(sizes["w"], generator=generator) < 0.5
            chosen_NE[0], chosen_NE[:, 2] = False, False
            self.w = self.w * chosen_NE

    @property
    def values(self):
        return [self.x, self.w, self.a, self.b]

    def learning(self, *names):
        for name in names or NAMES:
            getattr(self, name).requires_grad_()
        return self

    def formula(self):
        """sum over e of w_ne * b_e a_e x_n, one expert after the other."""
        update_NO = self.x.new_zeros(len(self.x), self.b.shape[1])
        for expert in range(len(RANKS)):
            own_S = (self.owner_S == expert).nonzero()[:, 0]
            a_RI = self.a[own_S if self.rows.a_row_S is None else self.rows.a_row_S[own_S]]
            b_RO = self.b[own_S if self.rows.b_row_S is None else self.rows.b_row_S[own_S]]
            update_NO = update_NO + self.w[:, expert, None] * (self.x @ a_RI.T @ b_RO)
        return update_NO

    def expert_product(self, y=None):
        return ExpertProduct.apply(y, *self.values, self.rows)

    def added(self, y=None, *, most=2):
        return add_experts(y, *self.values, self.rows, ranks=self.ranks, most=most)


def assert_gradients_are_the_formulas(made, example, names, upstream, *, skips=False):
    expected = example.formula()
    torch.testing.assert_close(made, expected)
    leaves = [getattr(example, name) for name in names]
    own, by_hand = (torch.autograd.grad(each, leaves, upstream) for each in (made, expected))
    for name, found, wanted in zip(names, own, by_hand, strict=True):
        # where tokens meet only their experts (`skips`), a weight of 0 has no gradient
        torch.testing.assert_close(found, wanted * (example.w != 0) if skips and name == "w" else wanted)
