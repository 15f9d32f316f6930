"""A merge states the licenses of its parents, and is refused where they exclude each other or any derived work."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import loraweave as lw
import loraweave.cli
from loraweave.composer.merge.arithmetic import negate, scale, subtract
from loraweave.composer.merge.merge import merge, merge_by_layer
from loraweave.errors import InvalidLicense
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Factors

LAYERS = ("layers.0.q_proj", "layers.0.v_proj")


def adapter(name, license=None):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    layers = {
        layer: Factors(torch.randn(2, 4, generator=generator), torch.randn(3, 2, generator=generator)) for layer in LAYERS
    }
    return Adapter(name, "org/base", layers, card={} if license is None else {"license": license})


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
    assert scale(only, 1.0).hash == only.hash
    assert scale(only, 1.0).card["license"] == "CC-BY-ND-4.0"
    for make in (
        lambda: scale(only, 0.5),
        lambda: negate(only),
        lambda: merge([only], [1.0], rank=1),
        lambda: merge([only], [1.0], method="ties"),
        lambda: subtract(adapter("b", "mit"), only),
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


def test_the_command_refuses_too_and_has_a_flag(tmp_path, monkeypatch):
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
    assert replace(lw.Adapter.from_pretrained("m"), name="x").card["license"] == "CC-BY-NC-4.0 AND GPL-3.0-only"
