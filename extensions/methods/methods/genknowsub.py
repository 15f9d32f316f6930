"""A sum of tasks without general knowledge: the mean of general updates is subtracted."""

from loraweave import Factors
from loraweave.extend import get
from loraweave.extend.merging import Experts, Weights


def genknowsub(experts: Experts, weights: Weights) -> Factors:
    """Return one layer's sum of w_e D_e over the tasks minus the mean of the general updates (GenKnowSub, arXiv 2505.10939).

    A positive weight says that an expert is a task, which adds w_e D_e; a negative one that it is general knowledge (say of
    one language). Together these subtract sum of |w_g| D_g / sum of |w_g|, once, from the sum: only proportions of their
    weights count. Without a negative weight it is `linear`. An expert without the layer is a zero update whose weight stays
    in the mean. By concatenation, so exact; gains and biases enter likewise. PEFT's version subtracts the means of a and of
    b apart, which is not a subtraction of updates.
    """
    general = sum(-float(weight) for weight in weights if weight < 0.0)
    difference: Factors = get("methods", "linear")(experts, [w / general if w < 0.0 else w for w in weights])
    return difference
