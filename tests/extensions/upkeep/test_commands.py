"""`loraweave hub history`, `rollback` and `prune`, `quarantine` and `release`, and `compositions` and its kin."""

import json
from functools import partial
from pathlib import Path

import command_line
import pytest
from command_line import call

import loraweave as lw

adapter = partial(command_line.adapter, layers=("0",), base_model="org/base")


@pytest.fixture
def hub(here):
    with lw.Hub("adapters") as opened:
        opened.add(adapter("antonym", 0))
        adapter("antonym", 1).save_pretrained("second")
        yield opened


@pytest.fixture
def pair(here):
    with lw.Hub("adapters") as opened:
        opened.add_many([adapter("a0", 0), adapter("a1", 1)])


def test_history_lists_the_versions_and_rollback_goes_back(hub):
    call("hub", "add", "second", "--name", "antonym", "--replace")
    done = call("hub", "rollback", "antonym", "1")
    assert (done.exit_code, done.stderr) == (0, "'antonym' is at version 3, with the content of version 1\n")
    told = json.loads(call("hub", "history", "antonym", "--json").stdout)
    assert [(row["version"], row["restored"]) for row in told] == [(1, None), (2, None), (3, 1)]
    assert [row["hash"] for row in told] == [adapter("", seed).hash for seed in (0, 1, 0)]
    shown = call("hub", "history", "antonym").stdout
    assert "back to 1" in shown
    assert adapter("", 1).hash[:12] in shown
    assert call("hub", "rollback", "antonym", "1", "--json").exit_code == 0


def test_prune_forgets_old_versions(hub):
    call("hub", "add", "second", "--name", "antonym", "--replace")
    assert call("hub", "prune", "antonym").stderr.startswith("1 versions of 'antonym' are forgotten")
    assert [record.version for record in hub.history("antonym")] == [2]
    assert json.loads(call("hub", "prune", "antonym", "--json").stdout) == {"forgotten": 0}
    assert call("hub", "prune", "antonym", "--keep", "0").exit_code == 2


def test_a_version_that_is_not_there_is_one_line(hub):
    done = call("hub", "rollback", "antonym", "7")
    assert (done.exit_code, done.stderr) == (1, "AdapterNotFound: adapter 'antonym' has no version 7; it has 1\n")


def test_what_is_put_aside_is_listed_with_what_was_found(pair):
    adapter("a0", 0).save_pretrained("again")
    call("hub", "add", "again", "--name", "again", "--anomalies", "quarantine")
    assert [row["name"] for row in json.loads(call("hub", "quarantine", "--json").stdout)] == ["again"]
    assert "it has the content of 'a0'" in call("hub", "quarantine").stdout


def test_putting_aside_and_taking_back(pair):
    assert "in quarantine" in call("hub", "quarantine", "a0").stderr
    assert [row["name"] for row in json.loads(call("hub", "list", "--json").stdout)] == ["a1"]
    assert "released" in call("hub", "release", "a0").stderr
    assert [row["name"] for row in json.loads(call("hub", "list", "--json").stdout)] == ["a0", "a1"]


def test_a_misspelt_name_changes_nothing(pair):
    done = call("hub", "quarantine", "a0", "nothing")
    assert (done.exit_code, "AdapterNotFound" in done.stderr) == (1, True)
    with lw.Hub("adapters") as opened:
        assert len(opened) == 2


def test_kept_formulas_are_listed_and_removed(pair):
    assert call("hub", "save-composition", "both", "a1+a0").exit_code == 0
    (told,) = json.loads(call("hub", "compositions", "--json").stdout)
    with lw.Hub("adapters") as opened:
        assert (told["name"], told["formula"], told["hash"]) == ("both", "a0 + a1", opened.composition("both").hash)
    assert "a0 + a1" in call("hub", "compositions").stdout
    assert call("hub", "remove-composition", "both").exit_code == 0
    assert json.loads(call("hub", "compositions", "--json").stdout) == []


def test_a_composed_folder_is_listed_and_written_as_it_was_saved(hub, make_model, make_adapters, tokenizer):
    model = make_model("llama")
    task = lw.Task([("a", "b"), ("c", "d"), ("e", "f")])
    composed = lw.compose(model, tokenizer, make_adapters(model, "llama"), task, method="uniform", progress=False)
    composed.save_pretrained("composed")
    assert call("hub", "save-composition", "swap", "composed").exit_code == 0
    (told,) = json.loads(call("hub", "compositions", "--json").stdout)
    assert told["chosen"] == json.loads(Path("composed/composition.json").read_text())["report"]["chosen"]
    assert f"composed: {told['chosen']}" in " ".join(call("hub", "compositions").stdout.split())
    assert call("hub", "write-composition", "swap", "again").exit_code == 0
    names = [str(path.relative_to("composed")) for path in Path("composed").rglob("*") if path.is_file()]
    assert [Path("again", name).read_bytes() for name in names] == [Path("composed", name).read_bytes() for name in names]
