"""The balance loss of top-k mixtures."""

from torch import Tensor


def mixtral(scores_NE: Tensor, top_k: int) -> Tensor:
    """Return E * sum over j < k and e of f_je p_e, over the real tokens of a layer (Mixtral's `load_balancing_loss_func`).

    f_je is the fraction of tokens whose j-th choice is expert e, p_e the mean of softmax(scores). The loss is k where all
    experts are used alike, and E where every token has all its probability on one expert.
    """
    p_NE = scores_NE.softmax(dim=1)
    num_tokens, num_experts = scores_NE.shape
    counts_E = p_NE.detach().topk(top_k, dim=1).indices.flatten().bincount(minlength=num_experts)
    return num_experts * (counts_E.to(p_NE.dtype) / num_tokens * p_NE.mean(dim=0)).sum()
