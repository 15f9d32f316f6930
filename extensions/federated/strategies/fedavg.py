"""FedAvg on a LoRA's factors, a and b averaged apart (McMahan et al. 2017, arXiv 1602.05629; FedIT): the baseline."""

from dataclasses import dataclass

from loraweave.extensions.federated.strategies._strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Fedavg(Strategy):
    """a = sum of n_k a_k over sum of n_k, and b likewise: not the mean of the updates b_k a_k, whose cross terms it has."""
