"""The live mixture as its formula, `naive`, the fast paths that must equal it, gradients included, and the choice by cost.

    y_BTO = ((x_BTI a_SI^T) * w_BTS) b_OS^T        B rows, T tokens (N = B T), I inputs, O outputs
                                                   P experts, R rank rows of one, S rank rows of all, M mixtures

    one mixture for all rows    shared      a pair of products, the weights in b
    a mixture for each row,     dense       all experts for all tokens, masked by the weights
    or weights by token
    experts in training         dense.add_experts

Extensions bring faster ways for many cases, as more entries of the registry: each says for which mixtures it is, and what it
costs; `_parts.choose` takes the cheapest. `tests/composer/live/kernels/test_naive.py` compares every entry with the formula;
`test_weighted_product.py` and `test_expert_product.py` are for what learns.
"""
