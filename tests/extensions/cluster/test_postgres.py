"""The catalogue on PostgreSQL: what is its own. What it shares with SQLite is in tests/conformance/test_hub_stores.py."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_hubs import adapter

from loraweave.errors import HubCorrupt, HubError, HubFull, HubLocked, HubReadOnly
from loraweave.extensions.cluster.catalogues import _migrations, postgresql
from loraweave.hub.hub import Hub
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Fingerprint

psycopg = pytest.importorskip("psycopg")

NUMBERS = itertools.count()


@pytest.fixture
def schema():
    return f"own_{next(NUMBERS)}"


@pytest.fixture
def place(postgres_server, schema, tmp_path):
    return postgres_server.url(schema), tmp_path / "blobs"


@pytest.fixture
def hub(place):
    with Hub(place[0], blobs=place[1]) as hub:
        hub.add(adapter(0))
        yield hub


def end_sessions(server):
    """What a restart of the server or a cut of the network does to sessions."""
    with server.connect() as connection:
        ended = connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'loraweave'"
        ).fetchall()
    return len(ended)


def test_the_password_is_in_no_message_and_no_representation(hub, place, postgres_server, schema):
    secrets = (postgres_server.password, "s3cr%3At%2Fp%40ss")
    shown = [repr(hub), str(hub.path)]
    with pytest.raises(LookupError) as found:
        hub["nothing"]
    shown.append(str(found.value))
    wrong = place[0].replace("s3cr", "other")
    for url in (wrong, place[0].replace(f":{postgres_server.port}/", ":1/"), place[0] + "&nonsense=1"):
        with pytest.raises(HubError) as found:
            Hub(url, blobs=place[1])
        shown += traceback.format_exception(found.value, chain=True)[-1:]
        shown.append(str(found.value.__cause__))
    assert f"postgresql://weaver@127.0.0.1:{postgres_server.port}/postgres?schema={schema}" in repr(hub)
    assert [text for text in shown for secret in (*secrets, "othert", "other%3A") if secret in text] == []


def test_a_lost_session_is_opened_anew_without_the_caller_noticing(hub, postgres_server):
    assert end_sessions(postgres_server) >= 1
    assert len(hub) == 1
    assert end_sessions(postgres_server) >= 1
    hub.add(adapter(1))
    assert len(hub) == 2


def test_a_session_lost_inside_a_change_is_named_and_changes_nothing(hub, postgres_server):
    def change():
        with hub._catalogue.writing("changing") as connection:
            connection.execute("DELETE FROM adapters")
            end_sessions(postgres_server)

    with pytest.raises(HubError, match=r"changing: no connection to postgresql://weaver@127.*nothing was changed"):
        change()
    assert len(hub) == 1
    hub.add(adapter(1))
    assert hub.verify().ok


def test_a_server_that_is_not_there_is_named(hub, place, tmp_path, postgres_server):
    url = place[0].replace(f":{postgres_server.port}/", ":1/")
    with pytest.raises(HubError, match=r"opening the hub: no connection to postgresql://weaver@127\.0\.0\.1:1/postgres"):
        Hub(url, blobs=tmp_path / "other", timeout_s=2)


def test_a_writer_that_is_killed_holds_no_lock(hub, place):
    code = (
        "import os, signal, sys\n"
        "from loraweave.extensions.cluster.catalogues.postgresql import Postgresql\n"
        "catalogue = Postgresql(sys.argv[1], 5.0)\n"
        "with catalogue.writing('dying') as connection:\n"
        "    connection.execute('DELETE FROM adapters')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, place[0]], capture_output=True, text=True, timeout=60)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(hub) == 1
    hub.add(adapter(1))
    assert hub.verify().ok


def test_two_hubs_of_one_database_do_not_wait_for_each_other(hub, postgres_server, tmp_path):
    with (
        Hub(postgres_server.url(f"own_{next(NUMBERS)}"), blobs=tmp_path / "other", timeout_s=0.2) as other,
        hub._catalogue.locked("holding"),
    ):
        other.add(adapter(1))
        assert [record.name for record in other] == ["adapter 1"]
    assert [record.name for record in hub] == ["adapter 0"]


def test_a_user_who_may_only_read_reads_and_searches_and_is_told_about_writing(hub, place, postgres_server, schema):
    hub.update("adapter 0", description="german")
    with postgres_server.connect() as connection:
        connection.execute(f"CREATE ROLE reader_{schema} LOGIN PASSWORD 'reader'")
        connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO reader_{schema}")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO reader_{schema}")
    url = place[0].replace("weaver:s3cr%3At%2Fp%40ss", f"reader_{schema}:reader")
    with Hub(url, blobs=place[1]) as reader:
        assert torch.equal(reader["adapter 0"].layers["layer"].a_RI, adapter(0).layers["layer"].a_RI)
        retriever = Retriever(reader, embedder="hashing")
        assert retriever.candidates("german")[0].name == "adapter 0"
        assert hub.vectors(retriever._index.embedder.id) == {}
        with pytest.raises(HubReadOnly, match=r"adding adapter 'adapter 1': .* cannot be written by this user"):
            reader.add(adapter(1))
    with pytest.raises(HubReadOnly, match="holds no hub of schema"):
        Hub(url.replace(f"schema={schema}", "schema=absent"), blobs=place[1])


def test_a_user_who_may_create_but_is_no_superuser_is_told_who_creates_pgvector(postgres_server, schema, tmp_path):
    with postgres_server.connect() as connection:
        connection.execute(f"CREATE ROLE owner_{schema} LOGIN PASSWORD 'owner'")
        connection.execute(f"CREATE DATABASE of_{schema} OWNER owner_{schema}")
    url = postgres_server.url(schema).replace("/postgres?", f"/of_{schema}?")
    owner = url.replace("weaver:s3cr%3At%2Fp%40ss", f"owner_{schema}:owner")
    wanted = (
        rf"pgvector.*the user 'owner_{schema}' may not.*superuser.*CREATE EXTENSION vector in the database 'of_{schema}'"
    )
    with pytest.raises(HubReadOnly, match=wanted):
        Hub(owner, blobs=tmp_path)
    with psycopg.connect(url.partition("?")[0], autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    with Hub(owner, blobs=tmp_path) as hub:
        hub.add(adapter(1))
        assert [record.name for record in hub] == ["adapter 1"]


@pytest.mark.parametrize("odd", ["org/\0", "org/\ud800"])
def test_texts_that_postgresql_has_not_are_stored_or_named(hub, odd):
    fingerprint = Fingerprint("0" * 64, (1.0,) * 256)
    one = replace(adapter(1), base_model=odd, fingerprint=fingerprint)
    hub.add(one, tags=[odd], language=odd, description=odd, examples=[odd])
    assert [record.base_model for record in hub.records(base_model=odd, tags=odd)] == [odd]
    assert hub["adapter 1"].base_model == odd
    assert hub.verify().ok
    with pytest.raises(HubError, match=r"storing vectors of embedder .* cannot hold one of the texts"):
        hub.store_vectors(odd, [("adapter 1", "digest", np.ones(3))])
    assert hub.verify().ok


def test_what_the_server_reports_becomes_the_same_errors_as_in_a_folder(hub):
    def change(error):
        with hub._catalogue.writing("changing"):
            raise error

    errors = psycopg.errors
    for given, wanted in (
        (errors.DiskFull("no space"), HubFull),
        (errors.ReadOnlySqlTransaction("a standby"), HubReadOnly),
        (errors.DataCorrupted("a page"), HubCorrupt),
        (errors.UndefinedTable("adapters"), HubCorrupt),
        (errors.LockNotAvailable("a row"), HubLocked),
        (errors.DeadlockDetected("two"), HubLocked),
        (errors.AdminShutdown("stopping"), HubError),
        (errors.DivisionByZero("what"), HubError),
    ):
        with pytest.raises(wanted, match=r"^changing: ") as found:
            change(given)
        assert type(found.value) is wanted
    assert hub.verify().ok


def test_a_newer_schema_is_refused_and_left_alone(hub, place):
    with hub._catalogue.writing("ageing") as connection:
        connection.execute("UPDATE state SET schema_version = 99")
    with pytest.raises(HubCorrupt, match=r"has schema 99, but this version of loraweave knows schemas up to \d+"):
        Hub(place[0], blobs=place[1])


def add_step(patch, *statements):
    """Gives the schema one more step; returns the number of those before."""
    steps = _migrations.STEPS
    for module in (_migrations, postgresql):
        patch.setattr(module, "STEPS", (*steps, statements))
    return len(steps)


def test_an_older_schema_is_copied_then_brought_up_to_date(hub, place, monkeypatch, postgres_server, schema):
    version = add_step(monkeypatch, "CREATE TABLE added (x INTEGER)")
    with Hub(place[0], blobs=place[1]) as newer:
        assert [record.name for record in newer] == ["adapter 0"]
    with postgres_server.connect() as connection:
        assert connection.execute(f"SELECT count(*) FROM {schema}.added").fetchone() == (0,)
        copied = connection.execute(f"SELECT name FROM {schema}_v{version}_backup.adapters").fetchall()
    assert copied == [("adapter 0",)]


def test_a_step_that_fails_leaves_the_older_catalogue_in_use(hub, place, monkeypatch):
    with monkeypatch.context() as patch:
        add_step(patch, "CREATE TABLE added (x INTEGER)", "SELECT 1/0")
        with pytest.raises(HubError, match="bringing the hub's catalogue up to date"):
            Hub(place[0], blobs=place[1])
    with Hub(place[0], blobs=place[1]) as again:
        assert [record.name for record in again] == ["adapter 0"]


def test_every_vector_has_an_embedding_with_the_same_numbers(hub):
    rng = np.random.default_rng(0)
    vector = (rng.standard_normal(100) * 10.0 ** rng.integers(-44, 38, 100)).astype(np.float32)
    for number in (1, 2):
        hub.store_vectors("e", [("adapter 0", "d", vector / number)])
        with hub._catalogue.reading() as connection:
            (text,) = connection.execute("SELECT embedding::text FROM vectors").fetchone()
        assert np.array_equal(np.array([float(part) for part in text[1:-1].split(",")]).astype(np.float32), vector / number)


def test_a_vector_longer_than_pgvector_takes_is_kept_without_an_embedding(hub):
    vector = np.ones(16_001, dtype=np.float32)
    hub.store_vectors("e", [("adapter 0", "d", vector)])
    assert np.array_equal(hub.vectors("e")["adapter 0"][1], vector)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://h/d?schema=Bad-Name", "lower case letters"),
        ("postgresql://h/d?schema=x;drop", "lower case letters"),
        ("postgresql://u:secret@[h/d", "cannot be read"),
        ("mysql://h/d", "in a folder or at postgresql"),
        ("s3://bucket/hub", 'takes its blobs: Hub\\("folder", blobs='),
    ],
)
def test_an_address_that_is_none_is_refused_without_repeating_its_password(url, message):
    with pytest.raises(HubError, match=message) as found:
        Hub(url)
    assert "secret" not in str(found.value)
    assert found.value.__cause__ is None


def test_a_hub_whose_files_have_no_place_says_how_to_give_one(postgres_server):
    with pytest.raises(HubError, match="needs a place for its blobs"):
        Hub(postgres_server.url(f"own_{next(NUMBERS)}"))


def test_a_child_of_a_fork_leaves_the_sessions_of_its_parent_alone(hub):
    assert len(hub) == 1
    child = os.fork()
    if not child:
        # nothing of pytest may run in it
        os._exit(0 if len(hub) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(hub) == 1
    hub.add(adapter(1))


def test_a_search_fetches_only_what_can_be_among_the_best_and_finds_what_flat_finds(hub, monkeypatch):
    rng = np.random.default_rng(0)
    words = ["translate", "summarise", "classify", "review", "german", "french", "code"]
    for seed in range(1, 40):
        # some of them alike, so that ties occur
        hub.add(adapter(seed), description=" ".join(rng.choice(words, 3)), tags=["odd"][: seed % 2])
    measure, own = Retriever(hub, embedder="hashing", index="flat"), Retriever(hub, embedder="hashing")
    options = [{"k": k} for k in (5, 1, 100, 0)]
    options += [{"k": 4, "tags": "odd"}, {"k": 9, "min_score": 0.5}, {"k": 3, "tags": "x"}]
    wanted = [measure.candidates(["german review", "code code"], **each) for each in options]
    with monkeypatch.context() as patch:
        for name in ("vectors", "records"):
            real = getattr(Hub, name)
            patch.setattr(Hub, name, lambda self, *args, real=real, **filters: real(self, **filters) if filters else 1 / 0)
        assert own.candidates(["german review", "code code"], k=5) == wanted[0]
    assert [own.candidates(["german review", "code code"], **each) for each in options] == wanted
    assert any(one.score == other.score for one, other in itertools.pairwise(wanted[2][0]))


def test_a_search_follows_every_change_of_the_hub(hub):
    own = Retriever(hub, embedder="hashing")
    hub.update("adapter 0", description="german")
    assert own.candidates("german", k=1)[0].score > 0.99
    hub.update("adapter 0", description="french")
    assert own.candidates("german", k=1)[0].score < 0.5
    assert own.candidates("french", k=1)[0].score > 0.99
    hub.add(adapter(1), description="german")
    hub.rename("adapter 1", "renamed")
    assert own.candidates("german", k=1)[0].name == "renamed"
    hub.remove("renamed")
    assert [candidate.name for candidate in own.candidates("german", k=5)] == ["adapter 0"]


def test_a_damaged_or_foreign_vector_is_searched_around(hub):
    hub.update("adapter 0", description="german")
    hub.add(adapter(1), description="french")
    measure, own = Retriever(hub, embedder="hashing", index="flat"), Retriever(hub, embedder="hashing")
    wanted = measure.candidates("german", k=2)
    assert own.candidates("german", k=2) == wanted
    for change in ("SET sha256 = 'x'", "SET embedding = '[1,2,3]'", "SET text_digest = 'of another release'"):
        with hub._catalogue.writing("damaging") as connection:
            connection.execute(f"UPDATE vectors {change} WHERE seq = (SELECT min(seq) FROM vectors)")
        assert own.candidates("german", k=2) == wanted
