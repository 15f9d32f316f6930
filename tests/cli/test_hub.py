"""`loraweave hub`: adding, listing, searching, putting aside and whole trees."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import command_line
import pytest
import torch
from command_line import call, cells
from installed import needs_entry

import loraweave as lw

adapter = partial(command_line.adapter, base_model="org/base")


@pytest.fixture
def hub(here):
    with lw.Hub("adapters") as opened:
        opened.add(adapter("antonym", 0), tags=["lexical"], license="MIT", description="the opposite of a word")
        opened.add(adapter("[bold] :smile: 😀", 1, base_model="org/other", card={"steps": 3}), tags=["lexical", "odd"])
        yield opened


def test_add_makes_a_hub_of_several_folders(here):
    for seed, name in enumerate(("one", "two")):
        adapter(name, seed).save_pretrained(name)
    done = call("hub", "add", "one", "two", "--tag", "a", "--tag", "b", "--license", "MIT", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [(row["name"], row["tags"], row["license"], row["rank"]) for row in told] == [
        ("one", ["a", "b"], "MIT", 2),
        ("two", ["a", "b"], "MIT", 2),
    ]
    with lw.Hub("adapters") as opened:
        assert opened["two"].hash == adapter("two", 1).hash


def test_add_reads_a_pickle_on_consent(here):
    from safetensors.torch import load_file

    adapter("trained").save_pretrained("trained")
    torch.save(load_file("trained/adapter_model.safetensors"), "trained/adapter_model.bin")
    Path("trained/adapter_model.safetensors").unlink()
    refused = call("hub", "add", "trained")
    assert (refused.exit_code, "--allow-pickle" in refused.stderr) == (1, True)
    done = call("hub", "add", "trained", "--allow-pickle", "--json")
    assert done.exit_code == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == ["trained"]


def test_add_takes_sample_inputs_from_a_file(here):
    adapter("one").save_pretrained("one")
    Path("samples.jsonl").write_text('{"input": "hello", "target": "x"}\n\n{"input": "there"}\n')
    done = call("hub", "add", "one", "--name", "greets", "--examples", "samples.jsonl", "--description", "says hi")
    assert done.exit_code == 0, done.stderr
    with lw.Hub("adapters") as opened:
        record = opened.record("greets")
    assert (record.examples, record.description) == (("hello", "there"), "says hi")


def test_sample_inputs_that_cannot_be_read_are_named_by_line(here):
    adapter("one").save_pretrained("one")
    Path("samples.jsonl").write_text('{"input": "hello"}\nhello\n')
    done = call("hub", "add", "one", "--examples", "samples.jsonl")
    assert done.exit_code == 1
    assert done.stderr.startswith("InvalidTask: samples.jsonl line 2")
    assert not Path("adapters").exists()


def test_one_name_for_two_adapters_is_wrong_usage(here):
    done = call("hub", "add", "one", "two", "--name", "x")
    assert (done.exit_code, Path("adapters").exists()) == (2, False)


def test_add_refuses_a_name_that_is_taken(hub):
    adapter("antonym", 7).save_pretrained("other")
    done = call("hub", "add", "other")
    assert (done.exit_code, done.stdout, done.stderr.split(":")[0]) == (1, "", "AdapterExists")
    assert done.stderr.count("\n") == 1


def test_list_shows_names_as_they_are(hub):
    lines = [line for line in call("hub", "list").stdout.splitlines() if "org/" in line]
    assert [cells(line)[0] for line in lines] == ["antonym", "[bold] :smile: 😀"]
    assert cells(lines[0])[1:5] == ["2", "org/base", "MIT", "lexical"]


def test_list_as_json_has_a_row_for_each_record(hub):
    done = call("hub", "list", "--json")
    told = json.loads(done.stdout)
    assert done.stderr == ""
    assert [row["name"] for row in told] == ["antonym", "[bold] :smile: 😀"]
    assert told[0]["hash"] == adapter("antonym", 0).hash
    assert told[0]["size_bytes"] == hub.record("antonym").size_bytes


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--tag", "lexical", "--tag", "odd"], ["[bold] :smile: 😀"]),
        (["--license", "mit"], ["antonym"]),
        (["--base-model", "org/other"], ["[bold] :smile: 😀"]),
        (["--tag", "none"], []),
    ],
)
def test_list_filters(hub, words, found):
    assert [row["name"] for row in json.loads(call("hub", "list", "--json", *words).stdout)] == found


def test_show_tells_all_that_is_known(hub):
    told = json.loads(call("hub", "show", "[bold] :smile: 😀", "--json").stdout)
    assert (told["card"]["steps"], told["fingerprint"], told["tags"]) == (3, None, ["lexical", "odd"])
    shown = call("hub", "show", "antonym", "--all").stdout
    assert "the opposite of a word" in shown
    assert adapter("antonym", 0).hash in shown


def test_show_is_short_and_says_how_to_see_more(hub):
    hub.update("antonym", examples=[f"word {number}" for number in range(9)])
    done = call("hub", "show", "antonym")
    fields = dict(cells(line) for line in done.stdout.splitlines())
    assert fields["sample inputs"] == "'word 0', 'word 1', 'word 2', and 6 more"
    assert (fields["rank"], fields["license"], fields["base model"]) == ("2", "MIT", "org/base")
    assert not {"card", "hash", "fingerprint"} & set(fields)
    assert "in quarantine" not in done.stdout
    assert done.stderr == "`loraweave hub show antonym --all` has the card, hashes and versions too\n"


def test_targets_beside_sample_inputs_are_stored_where_every_line_has_one(here):
    adapter("one").save_pretrained("one")
    Path("whole.jsonl").write_text('{"input": "ox", "target": "oxen"}\n{"input": "foot", "target": ["feet", "foots"]}\n')
    Path("partly.jsonl").write_text('{"input": "ox", "target": "oxen"}\n{"input": "foot"}\n')
    for name in ("whole", "partly"):
        assert call("hub", "add", "one", "--name", name, "--examples", f"{name}.jsonl").exit_code == 0
    with lw.Hub("adapters") as opened:
        assert opened.record("whole").card["outputs"] == ["oxen", "feet"]
        assert opened.record("partly").examples == ("ox", "foot")
        assert "outputs" not in opened.record("partly").card


def test_show_cuts_what_no_table_can_hold_and_says_so(hub):
    hub.update("antonym", examples=["x" * 300] * 5)
    shown = call("hub", "show", "antonym", "--all").stdout
    assert max(map(len, shown.splitlines())) < 600
    assert "characters; --json has all)" in shown


def test_search_gives_the_evidence(hub, words_embedder):
    told = json.loads(call("hub", "search", "opposite", "--json").stdout)
    assert [row["name"] for row in told] == ["antonym", "[bold] :smile: 😀"]
    assert told[0]["evidence"] == "description 'the opposite of a word' (1.00)"
    assert told[0]["score"] == pytest.approx(1.0, abs=1e-5)
    assert [row["name"] for row in json.loads(call("hub", "search", "opposite", "--k", "1", "--json").stdout)] == ["antonym"]


def test_search_says_when_nothing_fits(hub, words_embedder):
    done = call("hub", "search", "query", "--min-score", "0.5")
    assert (done.exit_code, done.stderr) == (0, "nothing fits: the base model is the answer\n")


def test_remove_takes_all_or_none(hub):
    assert call("hub", "remove", "antonym", "nobody").exit_code == 1
    assert len(hub) == 2
    done = call("hub", "remove", "antonym", "antonym")
    assert done.exit_code == 0, done.stderr
    assert [record.name for record in hub] == ["[bold] :smile: 😀"]


def test_gc_tells_the_bytes_it_freed(hub):
    size_bytes = sum(path.stat().st_size for path in hub.path.glob("blobs/*/*") if hub.record("antonym").hash in path.name)
    call("hub", "remove", "antonym")
    assert json.loads(call("hub", "gc", "--json").stdout) == {"freed_bytes": size_bytes}
    assert call("hub", "gc").stderr == "freed 0 kB\n"


def test_verify_of_a_whole_hub_is_quiet(hub):
    done = call("hub", "verify", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (
        0,
        {"ok": True, "problems": [], "intact": ["antonym", "[bold] :smile: 😀"], "orphans": []},
    )


def test_verify_of_a_damaged_hub_says_what_and_leaves_with_1(hub):
    path = next(path for path in hub.path.glob("blobs/*/*") if hub.record("antonym").hash in path.name)
    path.chmod(0o600)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    done = call("hub", "verify")
    assert done.exit_code == 1
    assert "antonym" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("HubCorrupt: the hub adapters has 1 problems")
    assert json.loads(call("hub", "verify", "--json").stdout)["ok"] is False


@pytest.mark.parametrize("words", [["list"], ["search", "x"], ["show", "x"], ["remove", "x"], ["verify"], ["gc"]])
def test_looking_at_a_hub_never_makes_one(here, words):
    done = call("hub", *words)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("HubError: no hub in 'adapters'; `loraweave hub add FOLDER --hub adapters` makes one")
    assert list(here.iterdir()) == []


def test_a_misspelt_name_is_answered_with_the_nearest(hub):
    done = call("hub", "show", "antonmy")
    assert (done.exit_code, done.stderr) == (
        1,
        "AdapterNotFound: no adapter 'antonmy' in the hub adapters; did you mean 'antonym'?\n",
    )


def test_the_environment_names_the_hub_and_the_flag_wins(here):
    for folder, name in (("first", "a"), ("second", "b")):
        with lw.Hub(folder) as opened:
            opened.add(adapter(name))
    env = {"LORAWEAVE_HUB": "first"}
    assert [row["name"] for row in json.loads(call("hub", "list", "--json", env=env).stdout)] == ["a"]
    assert [row["name"] for row in json.loads(call("hub", "list", "--json", "--hub", "second", env=env).stdout)] == ["b"]


def test_a_hostile_description_cannot_steer_the_terminal(hub):
    hub.update("antonym", description="fine\x1b[2Jcleared\nsecond line")
    shown = call("hub", "show", "antonym").stdout
    assert "\x1b" not in shown
    assert "fine [2Jcleared second line" in shown


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
@pytest.mark.parametrize("words", ["list", "list --json", "verify --json"])
def test_a_reader_that_goes_away_is_no_error(hub, words):
    # `true` is gone long before Python has started
    command = f"{sys.executable} -m loraweave hub {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_row_is_one_line_in_a_pipe_of_any_encoding(hub, encoding):
    hub.update("antonym", tags=[f"tag {number:030}" for number in range(10)])
    done = subprocess.run(
        [sys.executable, "-m", "loraweave", "hub", "list"],
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": ""},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if b"antonym" in line]
    assert len(lines) == 1
    assert f"tag {9:030}".encode() in lines[0]


def test_a_hub_on_a_server_is_named_by_a_url_and_its_files_by_another(here, postgres_server, monkeypatch):
    place, blobs = postgres_server.url("of_the_shell"), str(here / "blobs")
    adapter("one").save_pretrained("one")
    assert call("hub", "add", "one", "--hub", place, "--blobs", blobs).exit_code == 0
    monkeypatch.setenv("LORAWEAVE_HUB", place)
    monkeypatch.setenv("LORAWEAVE_BLOBS", blobs)
    assert [record["name"] for record in json.loads(call("hub", "list", "--json").stdout)] == ["one"]
    failed = call("hub", "show", "two")
    assert failed.exit_code == 1
    assert "AdapterNotFound: no adapter 'two' in the hub postgresql://weaver@127.0.0.1" in failed.stderr
    assert postgres_server.password not in failed.stderr


@pytest.fixture
def pair(here):
    """Two adapters in a hub, and the first of them in a folder."""
    with lw.Hub("adapters") as opened:
        opened.add_many([adapter("a0", 0), adapter("a1", 1)])
    adapter("a0", 0).save_pretrained("again")
    return here


@needs_entry("examiners", "anomalies")
def test_what_looks_wrong_is_told_and_put_aside_when_asked(pair):
    done = call("hub", "add", "again", "--name", "again", "--anomalies", "quarantine")
    assert done.exit_code == 0, done.stderr
    assert "duplicate: it has the content of 'a0'" in done.stderr
    assert "in quarantine" in done.stderr
    assert [row["name"] for row in json.loads(call("hub", "list", "--json").stdout)] == ["a0", "a1"]
    with lw.Hub("adapters") as opened:
        assert [record.name for record in opened.records(quarantined=True)] == ["again"]


@needs_entry("examiners", "anomalies")
def test_what_looks_wrong_is_refused_when_asked(pair):
    done = call("hub", "add", "again", "--name", "again", "--anomalies", "refuse")
    assert (done.exit_code, done.stderr.startswith("AdapterSuspicious: ")) == (1, True)


@needs_entry("examiners", "anomalies")
def test_show_has_what_was_found(pair):
    call("hub", "add", "again", "--name", "again")
    told = json.loads(call("hub", "show", "again", "--json").stdout)
    assert [anomaly["kind"] for anomaly in told["anomalies"]] == ["duplicate"]
    assert told["quarantined"] is False
    assert "it has the content of" in call("hub", "show", "again").stdout
