"""Filters are indexed look-ups on both databases, and hubs made before there was an index get it when they are opened."""

from __future__ import annotations

import itertools
import sqlite3
from contextlib import contextmanager

import pytest
import torch

from loraweave.errors import RetrievalError
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.tables.filtering import Filters
from loraweave.retrieval.retriever import Retriever
from loraweave.types import BaseKey, Factors, Fingerprint

NUMBERS = itertools.count()

# (rank, tags, languages, license) of the adapters a0, a1, ...; the layer is as wide as the rank
ADAPTERS = [
    (1, ["x"], ["de", "EN"], "MIT"),
    (2, ["x", "y\0"], [], None),
    (11, [], ["Straße"], "Apache-2.0"),
    (3, [], ["de"], "MIT"),
]


def add(hub):
    for number, (rank, tags, languages, license) in enumerate(ADAPTERS):
        factors = Factors(torch.full((rank, 2 * rank), 1.0 + number), torch.ones(2, rank))
        one = Adapter(f"a{number}", f"base {number % 2}", {"layer": factors})
        hub.add(one, tags=tags, language=languages, license=license)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request, tmp_path):
    if request.param == "sqlite":
        return tmp_path / "hub", None
    return request.getfixturevalue("postgres_server").url(f"filtering_{next(NUMBERS)}"), tmp_path / "blobs"


@pytest.fixture
def hub(place):
    with Hub(place[0], blobs=place[1]) as opened:
        add(opened)
        yield opened


CASES = [
    (Filters(language="DE"), [0, 3]),
    (Filters(language=("en", "STRASSE")), [0, 2]),
    (Filters(language="xx"), []),
    (Filters(language=()), []),
    (Filters(max_rank=2), [0, 1]),
    (Filters(max_rank=10**30), [0, 1, 2, 3]),
    (Filters(max_rank=0), []),
    (Filters(max_size_bytes=0), []),
    (Filters(max_size_bytes=10**30), [0, 1, 2, 3]),
    (Filters(tags="y\0"), [1]),
    (Filters(tags=["x"], max_rank=1), [0]),
    (Filters(license="MIT", language="de", max_rank=3, base_model="base 1"), [3]),
    (Filters(base_model=BaseKey("base 0")), [0, 2]),
]


@pytest.mark.parametrize(("filters", "wanted"), CASES)
def test_rows_and_records_pass_alike(hub, filters, wanted):
    assert [record.name for record in hub.records_at(hub.seqs(filters)).values()] == [f"a{number}" for number in wanted]
    assert [record.name for record in hub if filters.passes(record)] == [f"a{number}" for number in wanted]
    assert hub.verify().ok


def test_each_base_model_is_listed_once_with_its_first_adapter_and_the_number_of_those_not_in_quarantine(hub):
    assert [(record.name, count) for record, count in hub.bases()] == [("a0", 2), ("a1", 2)]
    hub.quarantine("a0")
    assert [(record.name, count) for record, count in hub.bases()] == [("a1", 2), ("a2", 1)]
    hub.quarantine("a2")
    assert [(record.name, count) for record, count in hub.bases()] == [("a1", 2)]


def test_only_a_fingerprint_that_differs_from_all_others_of_its_base_model_is_warned_of(hub):
    def update(name, base, fingerprint):
        factors = Factors(torch.full((1, 2), float(len(hub) + 9)), torch.ones(2, 1))
        return Adapter(name, base, {"layer": factors}, fingerprint)

    known, other = Fingerprint("known"), Fingerprint("other")
    # the first of a base model, one of no base model, one without a fingerprint, the same again
    for name, base, fingerprint in (("b", "c", known), ("d", "", other), ("e", "c", None), ("f", "c", known)):
        hub.add(update(name, base, fingerprint))
    with pytest.warns(UserWarning, match="'g' is stored, but its base 'c' is not the model that others in this hub call so"):
        hub.add(update("g", "c", other))
    hub.add(update("h", "c", other))


def test_the_size_is_the_blobs(hub):
    sizes = sorted(record.size_bytes for record in hub)
    for number, size in enumerate(sizes, start=1):
        found = hub.records_at(hub.seqs(Filters(max_size_bytes=size))).values()
        assert sorted(record.size_bytes for record in found) == sizes[:number]


class Recording:
    """A connection that notes the statements it runs."""

    def __init__(self, connection, statements):
        self.connection, self.statements = connection, statements

    def execute(self, statement, parameters=()):
        self.statements.append((statement, parameters))
        return self.connection.execute(statement, parameters)


def plans(hub, filters):
    """How the database runs each statement of a look-up, as one text for each."""
    statements, catalogue = [], hub._catalogue
    reading = catalogue.reading

    @contextmanager
    def recorded():
        with reading() as connection:
            yield Recording(connection, statements)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "reading", recorded)
        hub.seqs(filters)
    with reading() as connection:
        explain = "EXPLAIN QUERY PLAN"
        if not isinstance(connection, sqlite3.Connection):
            explain = "EXPLAIN"
            # of four rows it would read all, whatever index there is
            connection.execute("SET LOCAL enable_seqscan = off")
        for statement, parameters in statements:
            steps = connection.execute(f"{explain} {statement}", parameters).fetchall()
            yield "; ".join(str(step[-1]) for step in steps)


@pytest.mark.parametrize("filters", [filters for filters, _ in CASES])
def test_no_filter_reads_all_rows_of_a_table(hub, filters):
    found = list(plans(hub, filters))
    # those in quarantine are few, and all of them are asked for
    (_,) = [plan for plan in found if "quarantine" in plan]
    assert [plan for plan in found if "quarantine" not in plan and ("SCAN" in plan or "Seq Scan" in plan)] == []


def test_a_search_by_a_filter_that_nothing_passes_reads_no_more_records_than_it_tries(tmp_path, monkeypatch):
    from loraweave.hub.tables import rows

    class Zeros:
        dim, id = 2, "zeros"

        def embed(self, texts):
            return torch.zeros(len(texts), 2).numpy()

    with Hub(tmp_path) as hub:
        for number in range(90):
            hub.add(Adapter(f"a{number}", "b", {"layer": Factors(torch.full((1, 2), 1.0 + number), torch.ones(2, 1))}))
        retriever = Retriever(hub, embedder=Zeros(), keys=())
        assert len(retriever.candidates("x", k=1)) == 1
        seen, original = [], rows._decode
        monkeypatch.setattr(rows, "_decode", lambda found: seen.append(found[1]) or original(found))
        for filters in ({"language": "xx"}, {"max_rank": 0}, {"max_size_bytes": 1}):
            seen.clear()
            assert retriever.candidates("x", k=1, **filters) == []
            assert len(seen) <= 36, filters
            assert retriever.like("a0", **filters) == []
        with pytest.raises(RetrievalError):
            retriever.candidates("x", max_rank=-1)


def downgraded(hub, place):
    """Makes the hub what it was before the fifth step: no index, no compositions, and of labels only those of then."""
    statements = [
        "DROP TABLE compositions",
        "ALTER TABLE state DROP COLUMN num_compositions",
        "DROP INDEX blobs_by_size",
        "DELETE FROM labels WHERE kind IN ('language', 'rank')",
    ]
    with hub._catalogue.writing("going back") as connection:
        if isinstance(connection, sqlite3.Connection):
            statements += ["UPDATE labels SET value = 'y' || char(0) WHERE value LIKE 'y%'", "PRAGMA user_version = 4"]
        else:
            statements += ["UPDATE state SET schema_version = 4"]
        for statement in statements:
            connection.execute(statement)
    hub.close()
    return Hub(place[0], blobs=place[1])


def test_a_hub_made_before_gets_index_and_labels_when_it_is_opened(hub, place):
    with downgraded(hub, place) as again:
        for filters, wanted in CASES:
            found = again.records_at(again.seqs(filters)).values()
            assert [record.name for record in found] == [f"a{number}" for number in wanted]
        assert again.verify().ok
