"""Merges, compositions and exports state the licenses of all parents, and are refused where these exclude each other."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny_hubs
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import loraweave as lw
import loraweave.cli
from loraweave.composer.merge.merge import merge, merge_by_layer
from loraweave.errors import InvalidLicense
from loraweave.hub.pool import ExpertPool

LAYERS = ("layers.0.q_proj", "layers.0.v_proj")


def adapter(name, license=None):
    return tiny_hubs.adapter(ord(name), name, layers=LAYERS, card={} if license is None else {"license": license})


def by_layer(adapters, **options):
    pool = ExpertPool(adapters)
    return merge_by_layer(pool, {layer: dict.fromkeys(pool.names, 0.5) for layer in LAYERS}, name="both", **options)


def at_once(adapters, **options):
    return merge(adapters, [0.5] * len(adapters), name="both", progress=False, **options)


@pytest.mark.parametrize("merging", [at_once, by_layer])
@pytest.mark.parametrize(
    ("licenses", "want"),
    [
        (("mit", "apache-2.0"), "Apache-2.0 AND MIT"),
        (("gpl-3.0", "cc-by-sa-4.0"), "CC-BY-SA-4.0 AND GPL-3.0-only"),
        (("mit", None), "LicenseRef-unknown AND MIT"),
        ((None, None), None),
    ],
)
def test_a_merge_is_under_the_licenses_of_all_its_parents(merging, licenses, want):
    parents = [adapter(name, license) for name, license in zip("ab", licenses, strict=True)]
    merged = merging(parents)
    assert merged.card.get("license") == want
    told = {parent["name"]: parent["license"] for parent in merged.card["recipe"]["parents"]}
    spelt = {"mit": "MIT", "apache-2.0": "Apache-2.0", "gpl-3.0": "GPL-3.0-only", "cc-by-sa-4.0": "CC-BY-SA-4.0"}
    assert told == {name: spelt.get(license, "unknown") for name, license in zip("ab", licenses, strict=True)}


@pytest.mark.parametrize("merging", [at_once, by_layer])
def test_licenses_that_exclude_each_other_are_refused_unless_they_are_allowed(merging):
    parents = [adapter("a", "gpl-3.0"), adapter("b", "cc-by-nc-4.0")]
    with pytest.raises(InvalidLicense, match=r"GPL-3\.0-only.*CC-BY-NC-4\.0.*allow_licenses=True"):
        merging(parents)
    merged = merging(parents, allow_licenses=True)
    assert merged.card["license"] == "CC-BY-NC-4.0 AND GPL-3.0-only"


def test_an_adapter_that_counts_for_nothing_has_no_say():
    assert merge([adapter("a", "mit"), adapter("b", "cc-by-nd-4.0")], [1.0, 0.0]).card["license"] == "MIT"


def test_a_copy_is_no_derived_work_and_a_scaled_cut_or_negated_one_is():
    only = adapter("a", "cc-by-nd-4.0")
    assert merge([only], [1.0]).hash == only.hash
    assert merge([only], [1.0]).card["license"] == "CC-BY-ND-4.0"
    for make in (
        lambda: merge([only], [0.5]),
        lambda: merge([only], [-1.0]),
        lambda: merge([only], [1.0], rank=1),
        lambda: merge([only], [1.0], method="ties"),
        lambda: merge([adapter("b", "mit"), only], [1.0, -1.0]),
    ):
        with pytest.raises(InvalidLicense, match=r"CC-BY-ND-4\.0"):
            make()


def test_the_hub_and_the_card_show_the_licenses_of_all_parents(tmp_path):
    merged = at_once([adapter("a", "mit"), adapter("b", "apache-2.0"), adapter("c")])
    data = ModelCard.load(merged.save_pretrained(tmp_path / "out") / "README.md").data
    assert (data.license, data.license_name) == ("other", "Apache-2.0 AND LicenseRef-unknown AND MIT")
    with lw.Hub(tmp_path / "hub") as hub:
        assert hub.add(merged).license == "Apache-2.0 AND LicenseRef-unknown AND MIT"
        # it binds to more than MIT
        assert hub.records(license="MIT") == []


def test_the_command_that_merges_refuses_too_and_has_a_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one in (adapter("a", "gpl-3.0"), adapter("b", "cc-by-nc-4.0")):
        one.save_pretrained(one.name)
    words = ["merge", "./a", "./b", "--out", "m"]
    done = CliRunner().invoke(loraweave.cli.app, words)
    assert done.exit_code == 1
    assert done.stderr.startswith("InvalidLicense: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "m").exists()
    done = CliRunner().invoke(loraweave.cli.app, [*words, "--allow-licenses", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["license"] == "CC-BY-NC-4.0 AND GPL-3.0-only"
    assert dataclasses.replace(lw.Adapter.from_pretrained("m"), name="x").card["license"] == "CC-BY-NC-4.0 AND GPL-3.0-only"


EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c")]
FIT, EXCLUDE = ("mit", "apache-2.0", None), ("gpl-3.0", "cc-by-nc-4.0", "mit")


@pytest.fixture
def task():
    return lw.Task(EXAMPLES)


@pytest.fixture
def pool_of(tiny_llama, make_adapters):
    def make(licenses):
        adapters = make_adapters(tiny_llama, "llama")
        assert len(adapters) == len(licenses)
        cards = [{} if license is None else {"license": license} for license in licenses]
        pairs = zip(adapters, cards, strict=True)
        return lw.ExpertPool([dataclasses.replace(a, base_model="tiny", card=card) for a, card in pairs])

    return make


def compose(model, tokenizer, pool, task, **options):
    return lw.compose(model, tokenizer, pool, task, **{"budget": 20, "folds": 0, "progress": False, **options})


def test_a_composition_its_recipe_and_its_adapter_state_the_licenses_of_what_counts(
    tiny_llama, tokenizer, pool_of, task, tmp_path
):
    pool = pool_of(FIT)
    names = pool.names
    weights = {names[0]: 0.5, names[2]: 0.5}
    composed = compose(tiny_llama, tokenizer, pool, task, method="manual", weights=weights)
    want = "LicenseRef-unknown AND MIT"
    assert (composed.license, composed.adapter.card["license"]) == (want, want)
    told = json.loads((composed.save_pretrained(tmp_path / "c") / "composition.json").read_text())
    assert told["license"] == want
    assert {parent["name"]: parent["license"] for parent in told["parents"]} == {names[0]: "MIT", names[2]: "unknown"}
    again = lw.Composition.from_pretrained(tmp_path / "c", tiny_llama, tokenizer)
    assert again.license == want
    report = again.export(tmp_path / "out")
    assert (report.license, f"license: {want}" in str(report)) == (want, True)


@pytest.mark.parametrize("method", ["lorahub", "uniform", "auto"])
def test_a_pool_of_licenses_that_exclude_each_other_is_refused_before_anything_is_measured(
    tiny_llama, tokenizer, pool_of, task, method, monkeypatch
):
    monkeypatch.setattr(lw.Composer, "activate", lambda *_: pytest.fail("measured"))
    with pytest.raises(InvalidLicense, match=r"GPL-3\.0-only.*CC-BY-NC-4\.0.*allow_licenses=True"):
        compose(tiny_llama, tokenizer, pool_of(EXCLUDE), task, method=method)


# the uniform mixture is measured live
@pytest.mark.filterwarnings("ignore:this mixture may be used:UserWarning")
def test_allowed_licenses_are_stated_together(tiny_llama, tokenizer, pool_of, task):
    composed = compose(tiny_llama, tokenizer, pool_of(EXCLUDE), task, method="uniform", allow_licenses=True)
    assert composed.license == composed.adapter.card["license"] == "CC-BY-NC-4.0 AND GPL-3.0-only AND MIT"


@pytest.mark.filterwarnings("ignore:this mixture may be used:UserWarning")
def test_what_is_not_mixed_needs_no_license_that_fits(tiny_llama, tokenizer, pool_of, task, tmp_path):
    pool = pool_of(("cc-by-nd-4.0", "gpl-3.0", "cc-by-nc-4.0"))
    first, second, third = pool.names
    for options in ({"method": "best_single"}, {"method": "base"}, {"method": "manual", "weights": {first: 1.0}}):
        compose(tiny_llama, tokenizer, pool, task, **options).predict(["a"])
    copy = compose(tiny_llama, tokenizer, pool, task, method="manual", weights={first: 1.0})
    assert copy.export(tmp_path / "out").license == "CC-BY-ND-4.0"
    for weights in ({first: 0.5}, {second: 1.0, third: 1.0}):
        with pytest.raises(InvalidLicense):
            compose(tiny_llama, tokenizer, pool, task, method="manual", weights=weights)


def test_a_composition_that_was_trained_on_keeps_its_license(tiny_llama, tokenizer, pool_of, task):
    composed = compose(tiny_llama, tokenizer, pool_of(FIT), task, method="uniform")
    tuned = composed.tune(1, progress=False)
    assert tuned.license == tuned.adapter.card["license"] == "Apache-2.0 AND LicenseRef-unknown AND MIT"


def one(license, **card):
    return tiny_hubs.adapter(0, "x", layers=LAYERS[:1], card={"license": license, **card})


def test_an_export_of_a_copy_is_allowed_and_one_that_cuts_is_a_derived_work(tmp_path):
    given = one("cc-by-nd-4.0")
    assert given.export(tmp_path / "whole").license == "CC-BY-ND-4.0"
    with pytest.raises(InvalidLicense, match=r"CC-BY-ND-4\.0.*allow_licenses=True"):
        given.export(tmp_path / "cut", max_rank=1)
    assert not (tmp_path / "cut").exists()
    assert given.export(tmp_path / "cut", max_rank=1, allow_licenses=True).rank == 1


def test_an_export_of_a_merge_that_no_license_fits_is_refused_again(tmp_path):
    merged = lw.merge([one("gpl-3.0"), dataclasses.replace(one("cc-by-nc-4.0"), name="y")], [1, 1], allow_licenses=True)
    with pytest.raises(InvalidLicense, match=r"CC-BY-NC-4\.0 AND GPL-3\.0-only"):
        merged.export(tmp_path / "out")
    assert merged.export(tmp_path / "out", allow_licenses=True).license == "CC-BY-NC-4.0 AND GPL-3.0-only"


def test_the_command_exports_with_a_flag_and_says_the_license(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one("cc-by-nd-4.0").save_pretrained("x")
    words = ["export", "x", "--max-rank", "1", "--out", "p"]
    done = CliRunner().invoke(loraweave.cli.app, words)
    assert (done.exit_code, done.stderr.startswith("InvalidLicense: ")) == (1, True)
    done = CliRunner().invoke(loraweave.cli.app, [*words, "--allow-licenses"])
    assert done.exit_code == 0, done.stderr
    assert "license: CC-BY-ND-4.0" in done.stdout.splitlines()
