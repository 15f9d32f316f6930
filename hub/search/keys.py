"""An adapter's search key: the texts that are embedded for it, and the workers that embed many.

As in LoraRetriever (Zhao et al. 2024) it is the mean embedding of sample inputs. Unlike there, keys are scaled to unit norm:
the norm of a mean grows with how alike the samples are, so that it would favour narrow adapters (recall@1 on the pool's
training inputs .49 without, .58 with).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np

from loraweave.common.names import text_digest
from loraweave.hub.embedders._embedder import embed_checked, embedder_of, unit
from loraweave.hub.tables.rows import Said
from loraweave.types import Record

# The description's share of a key: the largest that does not worsen queries by inputs on the pool's training rows. Queries
# by another wording of it find the adapter first in .68 instead of .19 of the cases (benchmarks/retrieval.py).
# 0.5 would give .87, but lose .02 of recall@1 from one input.
DESCRIPTION_WEIGHT = 0.3

# more sample inputs hardly move a mean, but each costs an embedding
MAX_SAMPLE_INPUTS = 50

# the number of adapters whose keys are one piece of work
NUM_SPREAD = 64

# the number of adapters whose keys are stored at a time: a first search that is interrupted keeps them
_BATCH = 500

# the objects that have the texts of a key
Spoken = Record | Said

Embed = Callable[[tuple[str, ...]], np.ndarray]


def texts_of(record: Spoken) -> list[tuple[str, str]]:
    """Return the texts of an adapter's key as (kind, text): sample inputs and description, or its name if it has neither."""
    texts = [("sample input", text) for text in record.examples if text.strip()][:MAX_SAMPLE_INPUTS]
    if record.description.strip():
        texts.append(("description", record.description))
    return texts or [("name", record.name)]


def digest_of(record: Spoken) -> str:
    """Return the sha256 of the texts and their weights, in hexadecimal: a key with another digest is outdated."""
    # as json.dumps writes them, in a third of its time
    said = texts_of(record)
    texts = ", ".join(f"[{encode_basestring_ascii(kind)}, {encode_basestring_ascii(text)}]" for kind, text in said)
    return text_digest(f"[{DESCRIPTION_WEIGHT}, [{texts}]]")


def made_keys(embed: Embed, given: Any, records: Sequence[Spoken]) -> Iterator[tuple[Sequence[Spoken], list[np.ndarray]]]:
    """Yield (records, their keys (D,)) part by part; the workers of `joblib.parallel_config`, if any, make the keys of many.

    `given` is the embedder as the user named it, which a worker opens for itself.
    """
    if len(records) > NUM_SPREAD:
        # imports torch, which a search by another embedder can do without
        from loraweave.common.spread import processes_here

        if processes_here(None) is not None:
            yield from _spread_keys(given, records)
            return
    for start in range(0, len(records), _BATCH):
        part = records[start : start + _BATCH]
        yield part, _keys_of(embed, part)


def _keys_of(embed: Embed, records: Sequence[Spoken]) -> list[np.ndarray]:
    keys = []
    for record in records:
        kinds, texts = zip(*texts_of(record), strict=True)
        rows_ND = embed(texts).astype(np.float64)
        samples_ND = rows_ND[[kind == "sample input" for kind in kinds]]
        key_D = unit(samples_ND.mean(axis=0)) if len(samples_ND) else unit(rows_ND[0])
        if len(samples_ND) and kinds[-1] == "description":
            key_D = unit(key_D + DESCRIPTION_WEIGHT * rows_ND[-1])
        keys.append(key_D)
    return keys


def _spread_keys(given: Any, records: Sequence[Spoken]) -> Iterator[tuple[Sequence[Spoken], list[np.ndarray]]]:
    """Yield each piece with its keys as it ends. When all have ended, raise the error of the first that failed."""
    from loraweave.common.display import progress_bar
    from loraweave.common.spread import Failed, require_all, spread

    parts = [records[start : start + NUM_SPREAD] for start in range(0, len(records), NUM_SPREAD)]
    pieces = {part[0].name: part for part in parts}
    ended = {}
    with progress_bar(sys.stderr.isatty()) as bar:
        for name, outcome in spread(partial(_keys_by, given), pieces, n_jobs=None, label="embedding", bar=bar):
            ended[name] = outcome
            if not isinstance(outcome, Failed):
                yield pieces[name], outcome
    require_all(ended)


def _keys_by(given: Any, records: Sequence[Spoken]) -> list[np.ndarray]:
    """Return the keys by an embedder, which a worker opens once if it is given by name."""
    return _keys_of(partial(embed_checked, _embedder_named(given) if isinstance(given, str) else given), records)


_embedder_named = lru_cache(maxsize=1)(embedder_of)
