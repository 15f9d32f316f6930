"""Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), quantised by llama.cpp to 4 bits: half a billion parameters."""

from loraweave.extend.models import GgufBase
from loraweave.extensions.known_bases.fetching import SHA256, gguf_file, kept_file


def qwen2_5_coder_0_5b() -> GgufBase:
    """Return Qwen2.5-Coder-0.5B-Instruct, quantised by Q4_K_M, with its 8-bit output matrix as the embedding matrix, too."""
    return GgufBase("qwen2.5-coder-0.5b", SHA256, gguf_file, f"delete {kept_file()}, and try again", tied=True)
