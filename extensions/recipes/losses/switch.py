"""The balance loss of mixtures whose tokens have one expert each."""

from torch import Tensor

from loraweave.extend import get

mixtral = get("losses", "mixtral")


def switch(scores_NE: Tensor) -> Tensor:
    """Return E * sum over e of f_e p_e over the real tokens of one layer (Fedus et al. 2021, arXiv 2101.03961).

    f_e is the fraction of tokens with the highest score for e, without a gradient, p_e the mean of softmax(scores). 1 if all
    experts are used equally, E if one expert has all probability of all tokens.
    """
    loss: Tensor = mixtral(scores_NE, 1)
    return loss
