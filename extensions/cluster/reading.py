"""The reading of adapters by workers, when many are added to a hub or verified.

A worker reads and measures adapters and puts their content into the store, without rows; the calling process writes the
rows, in the order of the sources. The result does not depend on which worker was first.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from loraweave import Adapter, LoraweaveError, Record, names
from loraweave.extend import WorkersFailed, get, progress_bar, require_all, spread, storage_errors
from loraweave.extend.hubs import (
    MAX_BATCH_BYTES,
    Addition,
    BlobStore,
    CatalogueStore,
    Prepared,
    blob_problems,
    checked_policy,
    compositions,
    digests,
    prepare,
    put_content,
    recorded_blob,
    rows,
    stored_adapter,
    usable_blob,
)

# the numbers of sources, and of blobs to verify, that are one piece of work
PIECE = 32
MANY = 64

Read = Prepared | LoraweaveError


@dataclass(frozen=True, kw_only=True)
class ReadByWorker(Prepared):
    """An adapter whose content is `blob` in the store; `origin` is the blob's record if this worker wrote it, else None."""

    blob: rows.BlobRow
    origin: Record | None

    @property
    def has_written(self) -> bool:
        return self.origin is not None

    def read(self, blobs: BlobStore) -> Adapter:
        """Return the adapter. Raises AdapterCorrupt if its blob was collected or damaged since a worker wrote it."""
        return stored_adapter(blobs, rows.Row(0, self.record, self.blob))

    def usable_blob(self, catalogue: CatalogueStore, blobs: BlobStore) -> rows.BlobRow | None:
        content = self.record.hash
        known = recorded_blob(catalogue, content)
        if known is None and self.origin != self.record:
            # the blob's metadata has the record of another worker, or the record has changed since
            return None
        # an earlier batch may have rewritten the file, and then its row has another digest
        if known in (None, self.blob) and all(map(blobs.has, (content, *digests([self.record])))):
            return self.blob
        return usable_blob(catalogue, blobs, content)


def read_many(
    hub: compositions.CompositionShelf,
    additions: Sequence[Addition],
    *,
    anomalies: str | Mapping[str, str],
    n_jobs: int | None,
    progress: bool,
    **reading: Any,
) -> Iterator[tuple[Addition, Read]]:
    """Yield (source, the adapter or the error of reading it), in the sources' order; `reading` are options of `read_piece`.

    Sources whose workers are lost again and again each give WorkersFailed.
    """
    work = partial(read_piece, hub, measured=set(checked_policy(anomalies).values()) != {"off"}, **reading)
    parts = [additions[start : start + PIECE] for start in range(0, len(additions), PIECE)]
    pieces = {f"{number} of {len(parts)}, from {part[0].label} on": part for number, part in enumerate(parts, start=1)}
    ended: dict[str, list[Read]] = {}
    turn = deque(pieces)
    with progress_bar(progress) as bar:
        for name, outcome in spread(work, pieces, n_jobs=n_jobs, label="reading", bar=bar):
            if isinstance(outcome, list):
                ended[name] = outcome
            elif isinstance(outcome.error, WorkersFailed):
                ended[name] = [outcome.error] * len(pieces[name])
            else:
                raise outcome.error
            while turn and turn[0] in ended:
                name = turn.popleft()
                yield from zip(pieces[name], ended.pop(name), strict=True)


def read_piece(
    hub: compositions.CompositionShelf, additions: Sequence[Addition], *, measured: bool, stored_as: str, allow_pickle: bool
) -> list[Read]:
    """Return each source's adapter or error, after writing the adapters' content to the store, without rows.

    `measured` says whether adapters are also examined for anomalies.
    """
    done: list[Read] = []
    held: dict[int, Prepared] = {}
    for place, addition in enumerate(additions):
        try:
            prepared = prepare(addition, stored_as=stored_as, allow_pickle=allow_pickle)
        except LoraweaveError as error:
            done.append(error)
        else:
            for name in names("examiners") if measured else ():
                prepared = get("examiners", name).measure(prepared, hub._blobs)
            held[place] = prepared
            done.append(prepared)
        is_full = sum(prepared.num_bytes for prepared in held.values()) >= MAX_BATCH_BYTES
        if held and (is_full or place == len(additions) - 1):
            for number, stored in zip(held, _store_content(hub, list(held.values()), stored_as), strict=True):
                done[number] = stored
            held.clear()
    return done


def _store_content(hub: compositions.CompositionShelf, batch: Sequence[Prepared], stored_as: str) -> list[ReadByWorker]:
    """Write the blobs and files of a batch; return its records and figures, for the caller to give them rows."""
    catalogue, blobs = hub._catalogue, hub._blobs
    doing = f"adding adapter {batch[0].record.name!r}" if len(batch) == 1 else f"adding {len(batch)} adapters"
    wanted: dict[str, Prepared] = {}
    for prepared in batch:
        wanted.setdefault(prepared.record.hash, prepared)
    with catalogue.locked(doing), storage_errors(catalogue.where, doing):
        known = {content: usable_blob(catalogue, blobs, content) for content in wanted}
        written = put_content(blobs, batch, wanted, known, stored_as)
    stored = []
    for prepared in batch:
        content = prepared.record.hash
        blob = written.get(content) or known[content]
        assert blob is not None
        origin = prepared.record if content in written and wanted[content] is prepared else None
        stored.append(ReadByWorker(None, prepared.record, prepared.figures, prepared.num_bytes, blob=blob, origin=origin))
    return stored


def drop(hub: compositions.CompositionShelf, refused: Sequence[Prepared]) -> None:
    """Remove the blobs that workers wrote for adapters that the hub then refused, unless a row refers to the content."""
    catalogue, written = hub._catalogue, [prepared.record.hash for prepared in refused if prepared.has_written]
    doing = f"removing {len(written)} refused adapters"
    if not written:
        return
    with catalogue.locked(doing), storage_errors(catalogue.where, doing), catalogue.reading() as connection:
        for content in written:
            if rows.find_blob(connection, content) is None:
                with suppress(FileNotFoundError):
                    hub._blobs.remove(content)


def problems_of_blobs(
    hub: compositions.CompositionShelf, checks: Sequence[tuple[rows.BlobRow, str, str]], n_jobs: int | None
) -> list[list[str]]:
    """Return, for each blob in `checks`, a list of sentences about its damage, as workers read it; [] for a sound blob."""
    pieces = {f"from adapter {place + 1} on": checks[place : place + MANY] for place in range(0, len(checks), MANY)}
    with progress_bar(False) as bar:
        problems = require_all(dict(spread(partial(_problems, hub), pieces, n_jobs=n_jobs, label="reading", bar=bar)))
    return list(chain.from_iterable(problems[name] for name in pieces))


def _problems(hub: compositions.CompositionShelf, checks: Sequence[tuple[rows.BlobRow, str, str]]) -> list[list[str]]:
    return [list(blob_problems(hub._blobs, check)) for check in checks]
