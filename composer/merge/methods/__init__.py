"""One file per merge method: one layer's factors in, its merged update out.

A method is a function `(experts, weights, *, options)`, called only where at least one expert has the layer and a weight
other than 0. The annotations of its options are their ranges: `MethodCall` checks them and names the method and layer in
errors. All methods raise LayerMismatch for updates of different shape or kind and AdapterUnsupported for updates that need
the base layer (DoRA's magnitude, a trained base bias) or, unless they say that gains merge, have a gain. Those that take
weights as shares raise WeightingError for negative ones.
"""
