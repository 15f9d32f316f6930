"""Which router, or which search, is best? Published routers and searches beside the core's.

It adds routers that compare the experts' own outputs, decide by sequence or read a block's input, five searches and one
objective, each found by its name: `lw.router("spectr", pool)`, `lw.compose(.., method="bayesian")`. `BySequence` is the base
of routers that decide by a row's tokens so far, `OutputAttention` that of attention to outputs; `expert_losses` measures
each expert alone on tasks. `lw.router` and `Hub.add` open the X-LoRA and the Arrow that PEFT saved, and `save_as_peft`
writes them. It needs no other package, but `lorahub_original` needs `loraweave[search]`.
"""

from loraweave.extend import face

_MODULES = {
    "by_sequence": "BySequence",
    "routers.adapter_fusion": "OutputAttention",
    "routers.lorauter": "expert_losses",
    "to_peft": "save_as_peft",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
