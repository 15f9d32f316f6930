"""A composition and an export state the licenses of all adapters, and are refused where these exclude each other."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import loraweave as lw
import loraweave.cli
from loraweave.errors import InvalidLicense
from loraweave.types import Factors

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c")]
FIT, EXCLUDE = ("mit", "apache-2.0", None), ("gpl-3.0", "cc-by-nc-4.0", "mit")
LAYER = "layers.0.q_proj"


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


def adapter(license, **card):
    layers = {LAYER: Factors(torch.randn(2, 4), torch.randn(3, 2))}
    return lw.Adapter("x", "org/base", layers, card={"license": license, **card})


def test_an_export_of_a_copy_is_allowed_and_one_that_cuts_is_a_derived_work(tmp_path):
    given = adapter("cc-by-nd-4.0")
    assert given.export(tmp_path / "whole").license == "CC-BY-ND-4.0"
    with pytest.raises(InvalidLicense, match=r"CC-BY-ND-4\.0.*allow_licenses=True"):
        given.export(tmp_path / "cut", max_rank=1)
    assert not (tmp_path / "cut").exists()
    assert given.export(tmp_path / "cut", max_rank=1, allow_licenses=True).rank == 1


def test_an_export_of_a_merge_that_no_license_fits_is_refused_again(tmp_path):
    merged = lw.merge(
        [adapter("gpl-3.0"), dataclasses.replace(adapter("cc-by-nc-4.0"), name="y")], [1, 1], allow_licenses=True
    )
    with pytest.raises(InvalidLicense, match=r"CC-BY-NC-4\.0 AND GPL-3\.0-only"):
        merged.export(tmp_path / "out")
    assert merged.export(tmp_path / "out", allow_licenses=True).license == "CC-BY-NC-4.0 AND GPL-3.0-only"


def test_the_command_exports_with_a_flag_and_says_the_license(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter("cc-by-nd-4.0").save_pretrained("x")
    words = ["export", "x", "--max-rank", "1", "--out", "p"]
    done = CliRunner().invoke(loraweave.cli.app, words)
    assert (done.exit_code, done.stderr.startswith("InvalidLicense: ")) == (1, True)
    done = CliRunner().invoke(loraweave.cli.app, [*words, "--allow-licenses"])
    assert done.exit_code == 0, done.stderr
    assert "license: CC-BY-ND-4.0" in done.stdout.splitlines()
