"""How are many adapters trained within the available machines and memory? In groups, by workers, into a hub.

`train_adapters` then takes `hub=` and `n_jobs=`, and keeps each step within `memory_bytes`, or within what is free, by an
estimate that costs three forwards of two short rows. Workers are joblib's; it needs no other package.
"""

from loraweave.extend import face

_MODULES = {"groups": "train_in_groups", "step_memory": "EstimatedMemory MemoryModel"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
