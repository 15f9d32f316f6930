"""A hub with very many adapters that nobody trained: real rows and keys, clustered as keys of texts are, without blobs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import loraweave as lw
from loraweave.hub import search
from loraweave.hub.tables import rows, vectors

DIM = 384
# adapters of one topic, and how far they lie around it, relative to the topic's own direction
_PER_TOPIC = 100
_SPREAD = 0.8
_NUM_FIELDS = 64
_BATCH = 5000


class Synthetic:
    """Texts to unit vectors that depend on nothing but the text: the encoder's cost is not what is measured here."""

    dim = DIM
    id = "synthetic-384"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([_unit(_normal(zlib.crc32(text.encode()), 1))[0] for text in texts])


def keys(count: int, *, num_keys: int | None = None, seed: int = 0) -> np.ndarray:
    """`num_keys` unit vectors (default `count`) around the topics of a hub of `count`: fields of topics of adapters."""
    num_topics = max(8, count // _PER_TOPIC)
    fields = _unit(_normal(1, _NUM_FIELDS))
    rng = np.random.default_rng(2)
    topics = _unit(fields[rng.integers(_NUM_FIELDS, size=num_topics)] + _SPREAD * _unit(_normal(3, num_topics)))
    found = np.empty((num_keys or count, DIM), np.float32)
    for start in range(0, len(found), _BATCH):
        part = found[start : start + _BATCH]
        rng = np.random.default_rng([seed, start])
        part[:] = _unit(
            topics[rng.integers(num_topics, size=len(part))] + _SPREAD * _unit(_normal([seed, start], len(part)))
        )
    return found


def smooth_keys(count: int, *, num_keys: int | None = None, seed: int = 0) -> np.ndarray:
    """As many without any clusters: mixtures of 32 directions, and noise."""
    weights = np.random.default_rng([seed, 4]).standard_normal((num_keys or count, 32), dtype=np.float32)
    noise = np.random.default_rng([seed, 5]).standard_normal((num_keys or count, DIM), dtype=np.float32)
    return _unit(weights @ _normal(6, 32) / np.float32(32**0.5) + 0.3 * noise)


def record(number: int, count: int) -> lw.Record:
    """Tags let through a half, a hundredth and ten of all."""
    tags = ["half"] * (number % 2 == 0) + ["hundredth"] * (number % 100 == 0) + ["ten"] * (number % max(1, count // 10) == 0)
    fields = {"description": f"what adapter {number} does", "tags": tags, "license": "Apache-2.0"}
    return lw.Record(
        name=f"adapter {number:07d}",
        hash=f"{number:064x}",
        base_model=f"base {number % 3}",
        rank=8,
        target_modules=("q_proj", "v_proj"),
        license="Apache-2.0",
        tags=tuple(tags),
        description=fields["description"],
        size_bytes=0,
        created="2026-01-01T00:00:00+00:00",
        card=fields,
    )


def batches(count: int) -> Iterator[list[lw.Record]]:
    for start in range(0, count, _BATCH):
        yield [record(number, count) for number in range(start, min(count, start + _BATCH))]


def fill(folder: Path, records: Sequence[lw.Record], keys_ND: np.ndarray) -> None:
    """Adds rows and keys in one transaction, as `Hub.add` and a search would one by one; no blob is written."""
    with lw.Hub(folder) as hub, hub._catalogue.writing("filling") as connection:
        for one in records:
            rows.put_blob(connection, rows.BlobRow(one.hash, "0" * 64, 1000))
            rows.insert(connection, one)
        made = [(one.name, search._digest(one), key_D) for one, key_D in zip(records, keys_ND, strict=True)]
        vectors.write_vectors(connection, Synthetic.id, made)


def small_adapter(name: str, number: int) -> lw.Adapter:
    """One with a blob of its own, of some 10 kB."""
    generator = torch.Generator().manual_seed(number)
    factors = lw.Factors(torch.randn(8, 128, generator=generator), torch.randn(128, 8, generator=generator))
    return lw.Adapter(name, "base 0", {"model.layers.0.self_attn.q_proj": factors})


def _normal(seed: int | list[int], count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return scaled
