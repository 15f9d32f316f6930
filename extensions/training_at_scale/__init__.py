"""How are many adapters trained within the available machines and memory? In groups, by workers, into a hub.

`train_adapters` then takes `hub=` and `n_jobs=`, and keeps each step within `memory_bytes`, or within what is free, by an
estimate that costs three forwards of two short rows. Workers are joblib's; it needs no other package.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.training_at_scale.groups import train_in_groups
    from loraweave.extensions.training_at_scale.step_memory import EstimatedMemory, MemoryModel
else:
    _MODULES = {"groups": "train_in_groups", "step_memory": "EstimatedMemory MemoryModel"}
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = ["EstimatedMemory", "MemoryModel", "train_in_groups"]
