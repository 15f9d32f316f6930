"""What every embedder does to a text first."""

from __future__ import annotations

# far above the 256 tokens that a sentence encoder reads; a longer text costs minutes in a tokenizer that then drops it
MAX_CHARS = 16_384


def readable(text: str) -> str:
    """The first MAX_CHARS characters of a text, with lone surrogates as U+FFFD (tokenizers and hashes need valid UTF-8)."""
    return text[:MAX_CHARS].encode("utf-8", "surrogatepass").decode("utf-8", "replace")
