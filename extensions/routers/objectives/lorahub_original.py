"""LoraHub's loss as its authors coded it (Huang et al. 2023, lorahub/algorithm.py): divided by the examples once too often.

With an L1 term of 0.05 and merge method "factor_sum" it is what `LorahubOriginal` minimised when its results were published.
"""

from torch import Tensor

from loraweave.extend.scoring import CrossEntropy, RowSums


class LorahubOriginal(CrossEntropy):
    """The mean over all target tokens of all examples together, divided by the number of examples.

    The authors add up the mean token loss of each batch and divide by the number of examples instead of batches; all
    examples are one batch, as by default in their code. An L1 term thus counts that many times more than its coefficient.
    Long targets count more.
    """

    def losses(self, sums: RowSums) -> Tensor:
        """Return each example's share (N) of the loss; the loss is the mean of the shares."""
        return sums.negative_logs[:, 0] / sums.num_targets
