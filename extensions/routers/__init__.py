"""Which router, or which search, is best? Published routers and searches beside the core's.

It adds routers that compare the experts' own outputs, decide by sequence or read a block's input, five searches and one
objective, each found by its name: `lw.router("spectr", pool)`, `lw.compose(.., method="bayesian")`. `BySequence` is the base
of routers that decide by a row's tokens so far, `OutputAttention` that of attention to outputs; `expert_losses` measures
each expert alone on tasks. `lw.router` and `Hub.add` open the X-LoRA and the Arrow that PEFT saved, and `save_as_peft`
writes them. It needs no other package, but `lorahub_original` needs `loraweave[search]`.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.routers.by_sequence import BySequence
    from loraweave.extensions.routers.routers.adapter_fusion import OutputAttention
    from loraweave.extensions.routers.routers.lorauter import expert_losses
    from loraweave.extensions.routers.to_peft import save_as_peft
else:
    _MODULES = {
        "by_sequence": "BySequence",
        "routers.lorauter": "expert_losses",
        "routers.adapter_fusion": "OutputAttention",
        "to_peft": "save_as_peft",
    }
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = ["BySequence", "OutputAttention", "expert_losses", "save_as_peft"]
