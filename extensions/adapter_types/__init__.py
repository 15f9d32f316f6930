"""What do adapters of the types that few hubs hold come in as? As the factors that they mean, read like any other adapter.

It adds formats: most types that PEFT trains beyond LoRA, variants of LoRA, files of diffusers, sd-scripts, Megatron, mlx-lm
and Segment Anything, and ternary adapters. It costs nothing but a look at each format's file where a folder names no type.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.adapter_types.formats.compeft import Compeft
else:
    __getattr__ = lazy(__name__, {f"{__name__}.formats.compeft": "Compeft"})

__all__ = ["Compeft"]
