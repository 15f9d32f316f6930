"""Which router, or which search, is best? The published ones beside those that a first day needs.

It adds routers that compare the experts' own outputs, decide by sequence or read a block's input, five searches and one
objective, each found by its name: `lw.router("spectr", pool)`, `lw.compose(.., method="bayesian")`. `BySequence` is the base
of routers that decide by a row's tokens so far, `OutputAttention` that of attention to outputs. It needs no other package,
but `lorahub_original` needs `loraweave[search]`.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.routers.by_sequence import BySequence
    from loraweave.extensions.routers.output_attention import OutputAttention
else:
    __getattr__ = lazy(
        __name__, {f"{__name__}.by_sequence": "BySequence", f"{__name__}.output_attention": "OutputAttention"}
    )

__all__ = ["BySequence", "OutputAttention"]
