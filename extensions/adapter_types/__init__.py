"""How are adapters of rarer types read? As the factors of the same update, by the same call as any other adapter.

It adds formats: most types that PEFT trains beyond LoRA, variants of LoRA, files of diffusers, sd-scripts, Megatron, mlx-lm
and Segment Anything, and ternary adapters. It reads pickles, and trained heads in PEFT's folders. Its
formats are imported, in some 50 ms, when a process first reads an adapter.
"""

from loraweave.extend import face

_MODULES = {"formats.compeft": "Compeft"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
