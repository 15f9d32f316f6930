"""How does another program use the adapters here? Folders for engines and image tools, and formulas as names in vLLM.

It has `Adapter.export` and the targets of PEFT, vLLM, llama.cpp, OpenVINO, mlx-lm, diffusers and kohya's tools, the plugin
that vLLM finds by its entry point, and `loraweave load` for SGLang and LoRAX. It costs nothing until it is used; GGUF needs
the package gguf.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.engines.folders import Folder, Folders
    from loraweave.extensions.engines.loading import load, unload
else:
    __getattr__ = lazy(__name__, {f"{__name__}.folders": "Folder Folders", f"{__name__}.loading": "load unload"})

__all__ = ["Folder", "Folders", "load", "unload"]
