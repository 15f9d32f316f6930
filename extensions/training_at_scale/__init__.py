"""How are many adapters trained in the memory that there is? As many jobs share a step as fit, by an estimate of its peak.

`train_adapters` and `train_experts` then keep each step within `memory_bytes`, or within what is free, and report the peak.
It needs no other package, and costs three forwards of two short rows before the first step.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.training_at_scale.step_memory import EstimatedMemory, MemoryModel
else:
    __getattr__ = lazy(__name__, {f"{__name__}.step_memory": "EstimatedMemory MemoryModel"})

__all__ = ["EstimatedMemory", "MemoryModel"]
