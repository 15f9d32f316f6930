"""What recipes with a gate for each token add to a layer, written out."""

import pytest
import torch
from torch.nn import functional

LAYER = "model.layers.1.mlp.down_proj"


def softmax(scores_E):
    return functional.softmax(scores_E, dim=0)


def best(scores_E, top_k):
    """softmax over all, kept for the highest."""
    p_E = softmax(scores_E)
    kept = p_E.topk(top_k).indices
    return torch.zeros_like(p_E).index_copy(0, kept, p_E[kept])


def best_alone(scores_E, top_k):
    """softmax over the highest."""
    return best(scores_E, top_k) / best(scores_E, top_k).sum()


# the options, alpha / rank, and w_E of a token's scores
FORMULAS = {
    "hydralora": ({"num_experts": 3, "rank": 2, "alpha": 6.0, "dropout": 0.0}, 3.0, softmax),
    "mixtral": ({"num_experts": 5, "top_k": 3, "rank": 2, "alpha": 6.0}, 3.0, lambda scores_E: best_alone(scores_E, 3)),
    "mola": ({"num_experts": (3,), "rank": 2, "alpha": 6.0}, 3.0, lambda scores_E: best_alone(scores_E, 2)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_site_adds_its_formula(name, adds_up):
    options, scale, formula = FORMULAS[name]

    def weights(made, row, x_TI, x_I):
        return formula(made.gates[LAYER.replace(".", "/")].r_EI @ x_I)

    adds_up(name, LAYER, {"input_ids": torch.tensor([[3, 9, 27, 20, 60, 58, 11]])}, weights, scale, **options)
