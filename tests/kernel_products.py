"""Every kernel of the folder as a function of stacked factors."""

from loraweave import registry
from loraweave.composer.live.kernels._parts import RowKernel, row_sets
from loraweave.composer.live.kernels.dense import Dense, Stack
from loraweave.composer.live.kernels.naive import naive
from loraweave.composer.live.pages import PlacedFactors
from loraweave.composer.live.row_weights import RankedRows, _LayerRows


def rank_rows(a_SI, b_OS):
    """Each rank row of stacked factors as an expert."""
    return [PlacedFactors(a_SI[s : s + 1], b_OS[:, s : s + 1].T) for s in range(a_SI.shape[0])]


def by_rank_rows(name, x_BTI, a_SI, b_OS, w_BTS):
    """What a kernel makes of each rank row as an expert; `naive` where such weights are not for it."""
    kernel, parts, rows = registry.get("kernels", name), rank_rows(a_SI, b_OS), row_sets(w_BTS)
    # a way for experts in training takes only weights of which few are not 0; it and a product are tested by themselves
    if kernel is naive or not parts or hasattr(kernel, "add_experts") or hasattr(kernel, "add_product"):
        return naive(x_BTI, a_SI, b_OS, w_BTS)
    if not issubclass(kernel, RowKernel):
        return kernel(parts, w_BTS, x_BTI.dtype).update(x_BTI)
    if rows is None:
        return (
            Dense(Stack.of(parts, x_BTI.dtype), w_BTS).update(x_BTI) if kernel is Dense else naive(x_BTI, a_SI, b_OS, w_BTS)
        )
    ranked = RankedRows.of(rows, (1,) * len(parts))
    work = _LayerRows(x_BTI.device, x_BTI.dtype, ranked, None).workload(x_BTI.shape[2], b_OS.shape[0], x_BTI.shape[1])
    # one mixture alone is cheaper by another kernel, but is no error
    if not ranked.rows or (kernel.is_shared and work.num_segments > 1) or kernel.cost(work) is None:
        return naive(x_BTI, a_SI, b_OS, w_BTS)
    return ranked.among_all(kernel.of(parts, ranked.rows, x_BTI.dtype), len(rows), x_BTI.device).update(x_BTI)
