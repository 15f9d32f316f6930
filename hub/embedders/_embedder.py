"""The protocol of embedders, the choice of one, and the checks of its texts and vectors."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

import loraweave.registry as registry
from loraweave.common.process import one_blas_thread
from loraweave.errors import DimensionMismatch, RetrievalError

# far above the 256 tokens that a sentence encoder reads; a longer text costs minutes in a tokenizer that then drops it
MAX_CHARS = 16_384


def readable(text: str) -> str:
    """Return the first MAX_CHARS characters of a text, with lone surrogates as U+FFFD: tokenizers need valid UTF-8."""
    return text[:MAX_CHARS].encode("utf-8", "surrogatepass").decode("utf-8", "replace")


@runtime_checkable
class Embedder(Protocol):
    """A map of texts to unit vectors. `id` identifies all that a vector depends on: vectors of two are never mixed."""

    dim: int

    @property
    def id(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


def embedder_of(given: str | os.PathLike[str] | Embedder) -> Embedder:
    """Return the embedder of a registry name or of a folder that `train_encoder` wrote; return an Embedder unchanged.

    Raises RetrievalError for anything else.
    """
    if isinstance(given, Embedder):
        return given
    if not isinstance(given, str | os.PathLike):
        raise RetrievalError(
            f"embedder is {given!r:.80}; give a name of names('embedders'), the folder of a trained encoder, or an object "
            "with dim, id and embed"
        )
    name = os.fspath(given)
    if name not in registry.names("embedders") and Path(name).is_dir():
        trained: Embedder = registry.get("embedders", "sentence")(folder=name)
        return trained
    named: Embedder = registry.get("embedders", name)()
    return named


def embed_checked(embedder: Embedder, texts: tuple[str, ...]) -> np.ndarray:
    """Return vectors (N, dim) of the texts. Raises DimensionMismatch for another shape or values not finite."""
    rows_ND = np.asarray(embedder.embed(texts), dtype=np.float32)
    wanted = (len(texts), embedder.dim)
    if rows_ND.shape != wanted:
        raise DimensionMismatch(
            f"embedder {embedder.id!r} gave embeddings of shape {rows_ND.shape} instead of {wanted} (texts, dim)"
        )
    for number in np.flatnonzero(~np.isfinite(rows_ND).all(axis=1))[:1]:
        raise DimensionMismatch(
            f"embedder {embedder.id!r} gave an embedding that is not finite, "
            f"for text {number + 1} of {len(texts)}: {excerpt(texts[number])!r}"
        )
    return rows_ND


def embed_in_batches(
    texts: Sequence[str], encode: Callable[[list[str]], np.ndarray], dim: int, batch_texts: int
) -> np.ndarray:
    """Return vectors (N, dim), fp32, by `encode`, called on batches of `readable` texts; equal texts get equal rows.

    Batches run on as many threads as BLAS would use: its own threads wait for each other.
    """
    texts = [readable(text) for text in texts]
    # each distinct text once: padding in another batch would change its last bits, and ties would not be ties. Texts of like
    # length share a batch, so that little of it is padding
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    batches = [distinct[start : start + batch_texts] for start in range(0, len(distinct), batch_texts)]
    with one_blas_thread() as num_threads, ThreadPoolExecutor(num_threads) as threads:
        rows_ND = np.concatenate([np.empty((0, dim), np.float32), *threads.map(encode, batches)])
    position = {text: row for row, text in enumerate(distinct)}
    return rows_ND[[position[text] for text in texts]]


def unit(vector_D: np.ndarray) -> np.ndarray:
    """Return the vector at norm 1. A zero vector stays zero: it scores 0 with everything."""
    norm = float(np.linalg.norm(vector_D))
    return (vector_D / norm if norm else vector_D).astype(np.float32)


def excerpt(text: str, limit: int = 60) -> str:
    """Return the text's beginning in one line, for messages and evidence."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 4].rstrip() + " ..."
