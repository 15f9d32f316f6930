"""The live mixture as its formula, `naive`, the fast paths that must equal it, gradients included, and the choice by cost.

    y_BTO = ((x_BTI a_SI^T) * w_BTS) b_OS^T        B rows, T tokens (N = B T), I inputs, O outputs
                                                   P experts, R rank rows of one, S rank rows of all, M mixtures

    one mixture for all rows    shared      a pair of products, the weights in b
                                merged      multiplied out once, one product
    a mixture for each row      gathered    each row's factors side by side, batched products
                                segments    a pair of products for each distinct mixture
                                native_rows few tokens in one call of compiled code, on a CPU
    weights by token            dense       all experts for all tokens, masked by the weights
                                sorted_tokens    each expert meets only the tokens that chose it
    experts in training         _expert_product takes one of ExpertProduct, ChosenProduct and one token's own experts

Each file with a name says for which mixtures its path is, and what it costs; `_choice.choose` takes the cheapest. A new
path is one more file, tested by `tests/composer/live/kernels/test_naive.py`, which compares each with the formula.
`test_weighted_product.py` and `test_expert_product.py` are for paths that learn. Extensions bring more, such as
those for a GPU.
"""
