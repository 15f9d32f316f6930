"""The page's view of a hub: pages of its table, hits of a search, an adapter and its relatives.

Everything comes from the hub's public calls; nothing here computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loraweave import AdapterNotFound, Candidate, Hub, Record, Retriever
from loraweave.extend import algebra, composing
from loraweave.extend.formats import entry
from loraweave.extend.hubs import Filters
from loraweave.extend.merging import by_number
from loraweave.extend.routing import block_of
from loraweave.extensions.ui.overview import Overview, in_order

# the most adapters with the query in their name that are listed before the hits of a search
NUM_NAMED = 5
NUM_ALIKE = 8
# the most points of the map that are coloured by their score
NUM_SCORED = 500
# a first comparison of weights opens every adapter; larger hubs do so only when the user asks
MAX_COMPARED_UNASKED = 500
NUM_EXAMPLES, CARD_CHARACTERS = 20, 20_000
# the limits of a family tree
MAX_GENERATIONS, MAX_RELATIVES = 5, 60

Name = Annotated[str, Field(min_length=1, max_length=1024)]


class Query(BaseModel):
    """The base of all questions; itself a question without parameters."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Filtered(Query):
    """The filters that table and search share; an empty filter lets all adapters through."""

    base: str = ""
    license: str = ""
    tag: str = ""

    @property
    def options(self) -> dict[str, Any]:
        return {"base_model": self.base or None, "license": self.license or None, "tags": self.tag or ()}

    @property
    def filters(self) -> Filters:
        return Filters(**self.options)


class Listed(Filtered):
    start: Annotated[int, Field(ge=0)] = 0
    count: Annotated[int, Field(ge=1, le=200)] = 50
    sort: Literal["added", "name", "license", "rank", "size_bytes"] = "added"
    descending: bool = True
    quarantined: bool = False


class Searched(Filtered):
    q: Annotated[str, Field(max_length=4000)]
    count: Annotated[int, Field(ge=1, le=200)] = 20
    # evidence embeds the texts of adapters not found lately, which takes longer than the search
    evidence: bool = True


class Named(Query):
    name: Name


class Alike(Named):
    by: Literal["text", "weights"] = "text"
    asked: bool = False


class Placed(Query):
    seq: Annotated[int, Field(ge=0)]


class Catalogue:
    """A reader of a hub for the page, safe for several threads."""

    def __init__(self, hub: Hub, overview: Overview) -> None:
        self._hub = hub
        self._overview = overview
        self._retriever = Retriever(hub, keys=())

    def summary(self) -> dict[str, Any]:
        """Return the hub's place and counts, and the values to filter the page's table by."""
        snapshot = self._overview.newest
        bases = [{"name": first.base_model, "count": count} for first, count in self._hub.bases()]
        licenses = {} if snapshot is None else snapshot.licenses
        return {
            "place": place_of(self._hub),
            "count": len(self._hub),
            "quarantined": len(self._hub.records(quarantined=True)),
            "bases": bases,
            "licenses": [{"name": name, "count": count} for name, count in licenses.items() if name],
            "writable": self._hub.writable,
        }

    def listed(self, asked: Listed) -> dict[str, Any]:
        """Return one page of the table of adapters, with the total number."""
        if asked.quarantined:
            records = self._hub.records(**asked.options, quarantined=True)
            total, page = len(records), records[asked.start : asked.start + asked.count]
        else:
            seqs = self._hub.seqs(asked.filters)
            ordered = in_order(self._overview.newest, seqs, asked.sort, asked.descending)
            total, wanted = len(ordered), ordered[asked.start : asked.start + asked.count]
            by_seq = self._hub.records_at(wanted)
            page = [by_seq[seq] for seq in wanted if seq in by_seq]
        return {"total": total, "start": asked.start, "rows": [row_of(record) for record in page]}

    def searched(self, asked: Searched) -> dict[str, Any]:
        """Return the hits with their scores and evidence, after adapters whose names contain the query."""
        self._overview.require_search()
        if asked.evidence:
            hits = self._hub.search(asked.q, k=asked.count, **asked.options)
        else:
            hits = self._retriever.for_task([asked.q], evidence=False, k=asked.count, **asked.options)
        rows = {hit.name: hit_of(hit) for hit in hits}
        named: dict[str, dict[str, Any]] = {}
        snapshot, wanted = self._overview.newest, asked.q.strip()
        names: Sequence[str] = ()
        # a single letter is in most names
        if len(wanted) > 1:
            names = [wanted] * (wanted in self._hub) if snapshot is None else snapshot.named(wanted, NUM_NAMED)
        for name in names:
            record = self._record(name)
            if record is not None and asked.filters.passes(record) and not record.quarantined:
                row = rows.pop(name, {**row_of(record), "score": None, "evidence": ""})
                named[name] = {**row, "evidence": "; ".join(filter(None, ["its name", row["evidence"]]))}
        return {"more": len(hits) == asked.count, "rows": [*named.values(), *rows.values()]}

    def scores(self, asked: Searched) -> dict[str, Any]:
        """Return the scores of the adapters nearest to a query, for the colours of their points."""
        snapshot = self._overview.newest
        self._overview.require_search()
        hits = self._retriever.for_task([asked.q], evidence=False, k=NUM_SCORED, **asked.options)
        places = {} if snapshot is None else snapshot.seqs
        shown = [(places[hit.name], hit.score) for hit in hits if hit.name in places]
        return {"seqs": [seq for seq, _ in shown], "scores": [score for _, score in shown]}

    def points(self) -> dict[str, Any]:
        """Return the map's points; before there is a map, only the progress and error of making it."""
        snapshot = self._overview.newest
        state = {"busy": self._overview.busy, "error": self._overview.error}
        return state if snapshot is None else {**state, **snapshot.points()}

    def point(self, asked: Placed) -> dict[str, Any]:
        """Return the adapter of a point as a row. Raises AdapterNotFound if it was removed."""
        record = self._hub.records_at([asked.seq]).get(asked.seq)
        if record is None:
            raise AdapterNotFound("the adapter of this point is gone; reload the page for the map as it is now")
        return row_of(record)

    def adapter(self, asked: Named) -> dict[str, Any]:
        """Return a record with its history; no tensor is read."""
        record = self._hub.record(asked.name)
        card_fields = {key: value for key, value in record.card.items() if key not in ("recipe", "report", "outputs")}
        card = json.dumps(card_fields, indent=1, ensure_ascii=False, sort_keys=True) if card_fields else ""
        outputs = entry(record.card, "outputs", list) or []
        examples = [
            {"input": text, "output": outputs[at] if at < len(outputs) and isinstance(outputs[at], str) else ""}
            for at, text in enumerate(record.examples[:NUM_EXAMPLES])
        ]
        return {
            **row_of(record),
            "formula": str(composing.Named(record.name)),
            "hash": record.hash,
            "base_revision": record.base_revision or "",
            "language": list(record.language),
            "version": record.version,
            "modules": list(record.target_modules),
            "source": "" if record.source is None else record.source.location,
            "anomalies": [vars(anomaly) for anomaly in record.anomalies],
            "examples": examples,
            "num_examples": len(record.examples),
            "card": card[:CARD_CHARACTERS] + ("\n…" if len(card) > CARD_CHARACTERS else ""),
            "versions": [
                {name: getattr(version, name) for name in ("version", "restored", "hash", "rank", "size_bytes", "created")}
                for version in reversed(self._hub.history(asked.name))
            ],
            "family": self._family(record),
        }

    def layers(self, asked: Named) -> dict[str, Any]:
        """Return the Frobenius norm of each layer's low-rank update, as a grid of kinds by blocks."""
        adapter = self._hub.get(asked.name, quarantined=True)
        unbound = sum(not factors.bound for factors in adapter.layers.values())
        norms = {layer: algebra.norm(factors) for layer, factors in adapter.layers.items()}
        return {**grid(norms), "unbound": unbound, "heads": sorted(adapter.heads)}

    def alike(self, asked: Alike) -> dict[str, Any]:
        """Return the adapters most similar to one, by its texts, or by its weights, which first reads every adapter once."""
        record = self._hub.record(asked.name)
        if asked.by == "weights":
            if not asked.asked and len(self._hub) > MAX_COMPARED_UNASKED:
                return {"rows": [], "waits": len(self._hub)}
            return {"rows": [hit_of(hit) for hit in self._retriever.like(record.name, k=NUM_ALIKE)]}
        texts = list(record.examples) or [record.description or record.name]
        description = record.description if record.examples else ""
        self._overview.require_search()
        hits = self._retriever.for_task(texts[:NUM_EXAMPLES], description=description, evidence=False, k=NUM_ALIKE + 1)
        return {"rows": [hit_of(hit) for hit in hits if hit.name != record.name][:NUM_ALIKE]}

    def _family(self, record: Record) -> list[dict[str, Any]]:
        """Return the ancestors of a merged adapter, by generation; the adapter itself comes first."""
        relatives: list[dict[str, Any]] = [
            {"name": record.name, "weight": None, "child": None, "generation": 0, "known": True}
        ]
        ahead = [(0, record)]
        while ahead:
            child, relative = ahead.pop(0)
            generation = relatives[child]["generation"] + 1
            relatives[child]["method"] = entry(relative.card.get("recipe"), "method", str) or ""
            # a card is whatever somebody wrote into it
            parents = entry(relative.card.get("recipe"), "parents", (list, tuple)) or ()
            for parent in parents if generation < MAX_GENERATIONS else ():
                if not isinstance(parent, Mapping):
                    continue
                if len(relatives) >= MAX_RELATIVES:
                    return relatives
                name, weight = entry(parent, "name", str) or "", entry(parent, "weight", (int, float))
                there = self._record(name)
                known = there is not None and there.hash == entry(parent, "hash", str)
                share = None if weight is None else float(weight)
                place = {"child": child, "generation": generation, "known": known}
                relatives.append({"name": name, "weight": share, **place})
                if there is not None and known:
                    ahead.append((len(relatives) - 1, there))
        return relatives

    def _record(self, name: str) -> Record | None:
        try:
            return self._hub.record(name) if name in self._hub else None
        except AdapterNotFound:
            # an adapter removed in between has no row
            return None


def place_of(hub: Hub) -> str:
    """Return the folder or address of the hub as repr(hub) shows it, without a password."""
    return repr(hub)[len("Hub(") : -1].strip("'\"")


def row_of(record: Record) -> dict[str, Any]:
    """Return an adapter as a row of a table."""
    return {
        "name": record.name,
        "description": record.description,
        "license": record.license or "",
        "rank": record.rank,
        "base": record.base_model,
        "tags": list(record.tags),
        "size_bytes": record.size_bytes,
        "created": record.created,
        "quarantined": record.quarantined,
        "num_anomalies": len(record.anomalies),
    }


def hit_of(hit: Candidate) -> dict[str, Any]:
    """Return a hit as a row of a table, with its score and the reason why it was found."""
    return {**row_of(hit.record), "score": hit.score, "evidence": hit.evidence}


def block_and_kind(layer: str) -> tuple[str, str]:
    """Return (path up to the first number, the rest) of a layer; a layer outside blocks is its own block and kind."""
    block = block_of(layer)
    return (layer, layer) if block is None else (block, layer[len(block) + 1 :])


def grid(values: Mapping[str, float]) -> dict[str, Any]:
    """Return a value for each layer as rows of kinds by columns of blocks, None where a block has no layer of the kind.

    Blocks are in the order of their numbers, 2 before 10.
    """
    cells = {block_and_kind(layer): value for layer, value in values.items()}
    blocks = sorted({block for block, _ in cells}, key=by_number)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    return {"blocks": blocks, "kinds": kinds, "values": [[cells.get((block, kind)) for block in blocks] for kind in kinds]}
