"""How are adapters of rarer types read? As the factors of the same update, by the same call as any other adapter.

It adds formats: most types that PEFT trains beyond LoRA, variants of LoRA, files of diffusers, sd-scripts, Megatron, mlx-lm
and Segment Anything, and ternary adapters. It reads pickles, and trained heads in PEFT's folders. Its
formats are imported, in some 50 ms, when a process first reads an adapter.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.adapter_types.formats.compeft import Compeft
else:
    __getattr__ = lazy(__name__, {f"{__name__}.formats.compeft": "Compeft"})

__all__ = ["Compeft"]
