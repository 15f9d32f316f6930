"""The sum of updates with one common factor, exactly."""

from loraweave.composer.merge.method_call import Experts, Weights
from loraweave.composer.merge.methods._span import combination, counted
from loraweave.types import Factors


def task_arithmetic(experts: Experts, weights: Weights, *, scale: float = 1.0) -> Factors:
    """Return one layer's scale * sum of w_e D_e (Ilharco et al. 2023, arXiv 2212.04089, with LoRA updates as task vectors).

    `scale` is the paper's lambda; 0.3 to 0.4 is usual for many tasks. Weights are 1 in the paper; negative ones forget. By
    concatenation, so exact and of rank sum of R_e; gains and biases enter likewise. With scale 1 it is `linear`. An expert
    without the layer is a zero update.
    """
    updates, values = counted(experts, weights)
    return combination(updates, [scale * value for value in values])
