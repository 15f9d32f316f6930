"""How does another program use the adapters here? Folders for engines and image tools, and formulas as names in vLLM.

It has `Adapter.export` and the targets of PEFT, vLLM, llama.cpp, OpenVINO, mlx-lm, diffusers and kohya's tools, the plugin
that vLLM finds by its entry point, and `loraweave load` for SGLang and LoRAX. It costs nothing until it is used; GGUF needs
the package gguf.
"""

from loraweave.extend import face

_MODULES = {"folders": "Folder Folders", "loading": "load unload"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
