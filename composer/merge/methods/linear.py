"""The weighted sum of updates, exactly: sum over e of w_e b_e a_e by concatenating ranks (PEFT calls it `cat`)."""

from loraweave.composer.merge.method_call import Experts, Weights
from loraweave.composer.merge.methods._span import combination, counted
from loraweave.types import Factors


def linear(experts: Experts, weights: Weights) -> Factors:
    """Return one layer's sum over e of w_e * update_e, of rank sum of R_e; each weight enters once, on b.

    An expert without the layer adds nothing. Gains and biases sum likewise. A single expert of weight 1 comes back as it is,
    of whatever kind.
    """
    updates, values = counted(experts, weights)
    return combination(updates, values)
