"""The live mixture as its formula, `naive`, and the fast paths that must equal it, gradients included.

    y_BTO = ((x_BTI a_SI^T) * w_BTS) b_OS^T        B rows, T tokens (N = B T), I inputs, O outputs
                                                   P experts, R rank rows of one, S rank rows of all, M mixtures

    one mixture for all rows    shared      a pair of products, the weights in b
                                merged      multiplied out once, one product
    a mixture for each row      gathered    each row's factors side by side, batched products
                                segments    a pair of products for each distinct mixture
                                triton_gathered, triton_segments    the same in one launch each, on a GPU
    weights by token            dense       all experts for all tokens, masked by the weights
                                sorted_tokens    each expert meets only the tokens that chose it
    experts in training         _added_experts takes one of _expert_product, _chosen_product and one token's own experts

`_cost.py` says which is the cheapest. `tests/composer/live/kernels/test_naive.py` compares every path with a name with the
formula, `test_*_product.py` and `test_added_experts.py` those for training, and `test_triton.py` the GPU's with `naive`.
"""
