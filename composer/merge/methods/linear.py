"""The weighted sum of updates, exactly: sum over e of w_e b_e a_e by concatenating ranks (PEFT calls it `cat`)."""

from __future__ import annotations

from loraweave.composer.merge.methods._span import combination, counted
from loraweave.composer.merge.methods._terms import Experts, Weights
from loraweave.types import Factors


def linear(experts: Experts, weights: Weights) -> Factors:
    """One layer's sum over e of w_e * update_e, of rank sum of R_e; each weight enters once, on b.

    None stands for an expert without this layer, and is the answer when nothing is left. Gains and biases sum likewise.
    A single expert of weight 1 comes back as it is, of whatever kind. Raises LayerMismatch for updates of different
    shape, AdapterUnsupported for any other sum with an unbound update (DoRA's magnitude, a trained base bias).
    """
    updates, values = counted(experts, weights)
    return combination(updates, values)
