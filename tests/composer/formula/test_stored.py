"""Compositions that a hub keeps, inside formulas: formulas are written out, others are adapters or routers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_hubs import adapter

import loraweave as lw
from loraweave.composer.formula.nodes import leaves
from loraweave.errors import AdapterExists, FormulaError, ScopeError


@pytest.fixture
def hub(tmp_path):
    with lw.Hub(tmp_path / "hub") as opened:
        for seed, name in enumerate("abc"):
            opened.add(adapter(seed), name=name)
        yield opened


@pytest.fixture
def composed(tiny_llama, tokenizer, pool):
    """compose(method, **options) on a tiny model, of a pool of three."""
    task = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")], instruction="swap")

    def run(method, **options):
        return lw.compose(tiny_llama, tokenizer, pool, task, method=method, progress=False, **options)

    return run


def save(hub, **formulas):
    for name, text in formulas.items():
        hub.save_composition(name, lw.parse(text), replace=True)


@pytest.mark.parametrize(
    ("stored", "text", "written_out"),
    [
        ("0.5*a + b", "@x", "0.5*a + b"),
        ("0.5*a + b", "2*@x - b", "a + b"),
        ("0.5*a", "ties(@x, b)", "ties((0.5*a), b)"),
        ("a", "ties(@x, b)", "ties(a, b)"),
        ("ties(a, b)", "@x + c", "c + ties(a, b)"),
        ("a", "arrow(@x, c)", "arrow(a, c)"),
        ("arrow(a, b; top_k=1)", "@x", "arrow(a, b; top_k=1)"),
        ("auto", "@x", "auto"),
        ("base", "@x + a", "a"),
    ],
)
def test_a_stored_formula_is_written_out_where_it_is_named(hub, stored, text, written_out):
    save(hub, x=stored)
    expanded = lw.parse(text).expand(hub)
    assert expanded == lw.parse(written_out)
    assert lw.parse(str(expanded)) == expanded
    assert lw.parse(text).adapters(hub) == lw.parse(written_out).adapters(hub)
    if written_out != "auto":
        assert lw.parse(text).identity(hub) == lw.parse(written_out).identity(hub)


def test_a_stored_formula_follows_its_adapters_and_its_own_change(hub):
    save(hub, x="a + b")
    old = lw.parse("@x").identity(hub)
    hub.add(adapter(7), name="b", replace=True)
    assert lw.parse("@x").merge(hub, progress=False).hash == lw.merge([adapter(0), adapter(7)], [1, 1]).hash
    save(hub, x="a + b@1")
    assert lw.parse("@x").identity(hub) == old


def test_stored_formulas_may_name_each_other_but_not_in_a_circle(hub):
    save(hub, x="a + @y", y="2*b")
    assert lw.parse("@x - @y").expand(hub) == lw.parse("a")
    save(hub, y="@x")
    with pytest.raises(FormulaError, match="in a circle: @x -> @y -> @x"):
        lw.parse("@x").merge(hub)


def test_the_limit_of_adapters_holds_for_what_stored_formulas_say_together(hub):
    save(hub, x0="ties(a, b)")
    for number in range(1, 6):
        save(hub, **{f"x{number}": f"ties(@x{number - 1}, 2*@x{number - 1} + c)"})
    assert len(leaves(lw.parse("@x3").expand(hub).root)) <= 64
    with pytest.raises(FormulaError, match="adapters when its stored formulas are written out"):
        lw.parse("@x5").merge(hub)


@pytest.mark.parametrize("stored", ["arrow(a, b)", "auto"])
def test_what_stands_alone_is_no_part_of_a_formula(hub, stored):
    save(hub, x=stored)
    for text in ("@x + c", "ties(@x, c)", "arrow(@x, c)"):
        with pytest.raises(FormulaError, match=r"@x is (arrow\(a, b\)|auto), which stands alone"):
            lw.parse(text).expand(hub)


def test_an_expert_of_a_router_is_one_adapter(hub):
    save(hub, x="a + b", y="a")
    with pytest.raises(FormulaError, match="an expert of 'arrow' is one adapter"):
        lw.parse("arrow(@x, c)").mixture(hub)
    with pytest.raises(FormulaError, match="has an expert twice"):
        lw.parse("arrow(@y, a)").mixture(hub)


def test_a_stored_composition_is_its_adapter_in_a_formula(hub, composed):
    composition = composed("uniform")
    stored = hub.save_composition("swap", composition)
    assert stored.report == json.loads(json.dumps(composition.report.to_json()))
    one = lw.parse("@swap").merge(hub, progress=False)
    assert one.hash == composition.adapter.hash
    twice = lw.parse("2*@swap").merge(hub, progress=False)
    assert twice.hash == lw.merge([composition.adapter], [2.0]).hash
    formula = lw.parse("0.5*@swap")
    assert formula.mixture(hub) == {"@swap": 0.5}
    assert formula.pool(hub).names == ("@swap",)
    assert (
        formula.identity(hub)
        == formula.identity(formula.pool(hub))
        == lw.parse("0.5*a").identity({"a": composition.adapter})
    )


def test_a_stored_composition_comes_back_from_its_folder(hub, composed, tmp_path):
    composition = composed("uniform")
    hub.save_composition("swap", composition)
    folder = hub.composition("swap").write(tmp_path / "out")
    again = lw.Composition.from_pretrained(folder, composition.model, composition.tokenizer)
    assert again.mean_weights == composition.mean_weights
    assert again.adapter.hash == composition.adapter.hash
    assert hub.composition("swap").write(folder) == folder
    hub.save_composition("from a folder", folder)
    assert hub.composition("from a folder").hash == hub.composition("swap").hash
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(AdapterExists, match="holds something that is not a composition"):
        hub.composition("swap").write(tmp_path / "mine")


def test_a_stored_composition_with_a_router_is_that_router_and_stands_alone(hub, composed):
    composition = composed("arrow", top_k=1)
    hub.save_composition("routed", composition)
    formula = lw.parse("@routed")
    layer = next(iter(composition.router.members.layers))
    x_BTI = torch.randn(
        2, 3, composition.router.members.layers[layer].num_inputs, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(formula.mixture(hub).weights(x_BTI, layer), composition.router.weights(x_BTI, layer))
    assert formula.pool(hub).names == composition.router.members.names
    assert len(formula.identity(hub)) == 64
    for text in ("@routed", "@routed + a", "ties(@routed, a)"):
        with pytest.raises(ScopeError, match=r"@routed is a router, .* activate formula.mixture"):
            lw.parse(text).merge(hub)


def test_a_stored_average_of_members_is_kept_and_says_that_it_is_no_adapter(hub, composed, tmp_path):
    members = {"one": composed("uniform"), "other": composed("base")}
    average = replace(members["one"], members=members, pool=None, all_weights={})
    hub.save_composition("both", average)
    with pytest.raises(ScopeError, match="@both has the members one and other"):
        lw.parse("@both").merge(hub)
    again = lw.Composition.from_pretrained(hub.composition("both").write(tmp_path / "out"), average.model, average.tokenizer)
    assert again.members["one"].adapter.hash == members["one"].adapter.hash
    assert again.members["other"].is_base


def test_a_stored_composition_that_is_the_base_adds_nothing(hub, composed):
    hub.save_composition("nothing", composed("base"))
    assert lw.parse("a + @nothing").expand(hub) == lw.parse("a")
    assert lw.parse("@nothing").expand(hub).is_base


def test_a_stored_router_without_its_adapters_is_refused_by_name(hub, tmp_path):
    router = lw.router("arrow", hub.pool())
    with pytest.raises(ScopeError, match="router 'arrow' has no adapters of its own"):
        hub.save_composition("mix", router)
    hub.save_composition("mix", router.save_pretrained(tmp_path / "alone"))
    with pytest.raises(ScopeError, match="@mix is a router that was saved without its adapters"):
        lw.parse("@mix").mixture(hub)
