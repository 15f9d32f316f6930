"""What a formula does: the adapter, mixture and router that it says, its identity, and its errors about a hub."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_hubs import adapter

import loraweave as lw
from loraweave import registry
from loraweave.composer.merge.method_call import MethodCall
from loraweave.errors import (
    AdapterQuarantined,
    CompositionError,
    FormulaError,
    InvalidLicense,
    ScopeError,
    WeightingError,
)


@pytest.fixture
def hub(tmp_path):
    """Adapters a, b and c; of a there are two versions."""
    with lw.Hub(tmp_path / "hub") as opened:
        opened.add(adapter(9), name="a")
        for seed, name in enumerate("abc"):
            opened.add(adapter(seed), name=name, replace=True)
        yield opened


@pytest.fixture
def pool(hub):
    return hub.pool()


def merged(text, given, **options):
    return lw.parse(text).merge(given, progress=False, **options)


def dense(given):
    return given.delta("layer").double()


@pytest.mark.parametrize(
    ("text", "weights"),
    [("0.7*a + 0.3*b", (0.7, 0.3, 0)), ("a - 0.5*c", (1, 0, -0.5)), ("2*(a + b) - (b - c)", (2, 1, 1)), ("-b", (0, -1, 0))],
)
def test_a_sum_is_the_weighted_sum_of_updates(hub, text, weights):
    want = sum(weight * dense(hub[name]) for weight, name in zip(weights, "abc", strict=True))
    torch.testing.assert_close(dense(merged(text, hub)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["hub", "pool", "list", "mapping", "lazy"])
def test_a_formula_merges_what_lw_merge_merges_wherever_the_adapters_are(hub, given):
    a, b, c = (hub[name] for name in "abc")
    places = {"hub": hub, "pool": hub.pool(), "list": [a, b, c], "mapping": {"a": a, "b": b, "c": c}}
    place = places[given] if given in places else hub.pool(lazy=True)
    for text, want in [
        ("0.7*a + 0.3*b", lw.merge([a, b], [0.7, 0.3])),
        ("a", a),
        ("ties(a, b, c; density=0.3)", lw.merge([a, b, c], method="ties", density=0.3)),
        ("ties(0.7*a, 0.3*b)", lw.merge([a, b], [0.7, 0.3], method="ties")),
        ("ties(a, a, b)", lw.merge([a, a, b], method="ties")),
        ("dare_linear(a, b; density=0.5, seed=3)", lw.merge([a, b], method="dare_linear", density=0.5, seed=3)),
        ("svd(1*a, 1*b; rank=2)", lw.merge([a, b], [1, 1], method="svd", rank=2)),
        ("0.5*ties(a, b) + c", lw.merge([lw.merge([a, b], method="ties"), c], [0.5, 1])),
        (
            "ties(0.5*(a + b), 0.5*svd(b, c))",
            lw.merge([lw.merge([a, b], [1, 1]), lw.merge([b, c], method="svd")], method="ties"),
        ),
    ]:
        assert merged(text, place).hash == want.hash, text


@pytest.mark.parametrize("method", [name for name in lw.names("methods") if "statistics" not in MethodCall(name).parameters])
def test_every_method_that_needs_no_data_is_a_formula(hub, method):
    # some methods take adapters that share A, or that pull the same way
    first = hub["a"].layers["layer"]
    each = {name: first.b_OR + 0.3 * hub[name].layers["layer"].b_OR for name in "abc"}
    alike = [replace(hub[name], layers={"layer": replace(first, b_OR=b_OR)}) for name, b_OR in each.items()]
    alike = alike[: 2 if "pairs" in registry.traits_of(registry.get("methods", method)) else 3]
    want = lw.merge(alike, [1 / len(alike)] * len(alike), method=method, progress=False)
    assert merged(f"{method}({', '.join(each.name for each in reversed(alike))})", alike).hash == want.hash


def test_the_name_of_what_is_merged_is_the_formula_or_the_name_given(hub):
    assert merged("b+a", hub).name == "a + b"
    assert merged("b+a", hub, name="both").name == "both"
    long = merged(" + ".join(f"a + ties(0.{'1' * n}*a, 1*b; density=0.{'1' * n})" for n in range(10, 15)), hub, rank=2)
    assert len(long.name) == 200
    assert hub.add(long).name == long.name
    assert merged("ties(a, b)", hub).card["recipe"]["method"] == "ties"


def test_a_rank_is_cut_once_at_the_end(hub):
    assert merged("a + b", hub, rank=1).hash == lw.merge([hub["a"], hub["b"]], [1, 1], rank=1).hash
    assert merged("ties(a, b)", hub, rank=1).hash == lw.merge([hub["a"], hub["b"]], method="ties", rank=1).hash
    with pytest.raises(WeightingError, match="rank=1 is asked for, and the formula has rank=2"):
        merged("ties(a, b; rank=2)", hub, rank=1)


def test_versions_are_kept_apart_in_one_formula(hub):
    want = dense(adapter(9)) - 0.5 * dense(adapter(0))
    torch.testing.assert_close(dense(merged("a@1 - 0.5*a", hub)), want, rtol=1e-5, atol=1e-5)
    assert lw.parse("a@1 - 0.5*a").mixture() == {"a@1": 1.0, "a": -0.5}
    assert lw.parse("a@1 - 0.5*a").pool(hub).names == ("a@1", "a")


def test_a_live_mixture_is_the_merged_adapter(tiny_llama, make_adapters):
    model, batch = tiny_llama, {"input_ids": torch.tensor([[3, 5, 7, 9], [4, 6, 8, 10]])}
    adapters = [replace(each, name=name) for each, name in zip(make_adapters(model, "llama"), "abc", strict=True)]
    formula = lw.parse("0.7*a - 0.2*b")
    with lw.Composer(model, formula.pool(adapters)).activate(formula.mixture()):
        live = model(**batch).logits
    one = formula.merge(adapters, name="one", progress=False)
    with lw.Composer(model, [one]).activate({"one": 1.0}):
        torch.testing.assert_close(model(**batch).logits, live, rtol=1e-4, atol=1e-4)


def test_a_router_is_that_of_lw_router_over_the_adapters(hub, pool):
    formula = lw.parse("arrow(c, a; top_k=1, temperature=0.5)")
    found, want = formula.mixture(hub), lw.router("arrow", pool.subset(["a", "c"]), top_k=1, temperature=0.5)
    x_BTI = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.weights(x_BTI, "layer"), want.weights(x_BTI, "layer"))
    assert formula.pool(hub).names == found.members.names == ("a", "c")


def test_the_members_of_an_ensemble_are_formulas_and_their_shares_sum_to_1(hub, pool):
    formula = lw.parse("ensemble(3*(a + b), 1*base)")
    assert formula.members(hub) == ((0.75, lw.parse("a + b")), (0.25, lw.parse("base")))
    assert formula.pool(hub).names == formula.adapters(hub) == ("a", "b")
    assert lw.parse("a - b").members() == ((1.0, lw.parse("a - b")),)
    hub.save_composition("both", formula)
    assert lw.parse("@both").expand(hub) == formula
    assert lw.parse("@both").identity(hub) == formula.identity(pool) != lw.parse("ensemble(a + b, base)").identity(hub)
    with pytest.raises(FormulaError, match="which stands alone"):
        lw.parse("a + @both").expand(hub)


@pytest.mark.parametrize(
    ("text", "call", "way_out"),
    [
        ("arrow(a, b)", "merge", "Activate it instead: Composer"),
        ("auto", "merge", "retrieval chooses for each request"),
        ("auto", "mixture", "retrieval chooses for each request"),
        ("auto", "pool", "retrieval chooses for each request"),
        ("auto", "identity", "retrieval chooses for each request"),
        ("ensemble(a, b)", "merge", "its members answer apart"),
        ("ensemble(a, b)", "mixture", "its members answer apart"),
        ("base", "merge", "use the model as it is"),
        ("base", "pool", "use the model as it is"),
        ("0.5*ties(a, b) + c", "mixture", r"ties\(a, b\) is not a weighted sum .* formula.merge"),
    ],
)
def test_what_a_formula_cannot_be_is_a_scope_error_that_names_the_way_out(hub, text, call, way_out):
    with pytest.raises(ScopeError, match=way_out):
        getattr(lw.parse(text), call)(hub)


def test_a_router_or_a_stored_composition_has_no_mixture_without_its_adapters():
    for text in ("arrow(a, b)", "@x", "a + @x"):
        with pytest.raises(ScopeError, match="pass the hub or the pool"):
            lw.parse(text).mixture()


def test_the_base_has_an_empty_mixture_and_no_adapters(hub):
    for text in ("base", "a - a"):
        formula = lw.parse(text)
        assert (formula.is_base, formula.is_auto, formula.mixture(), formula.adapters(hub)) == (True, False, {}, ())
    assert lw.parse("auto").is_auto
    assert lw.parse("auto").adapters(hub) == ()


def test_the_adapters_of_a_formula_are_named_once_and_looked_for_in_the_hub(hub):
    formula = lw.parse("ties(0.5*(b + a@1), 0.5*zebra) - a")
    assert formula.adapters() == ("a", "b", "zebra")
    with pytest.raises(FormulaError, match="no adapter 'zebra'"):
        formula.adapters(hub)
    assert lw.parse("ties(0.5*(b + a@1), 0.5*c) - a").adapters(hub) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "problem", "place"),
    [
        ("0.5*a + helo", "no adapter 'helo' in the hub .* did you mean 'hello'", "        ^~~~"),
        ("a-b + c", "no adapter 'a-b' .* a difference has spaces around its '-'", "^~~"),
        ("b - a@7", "adapter 'a' has no version 7; it has 1, 2", "    ^"),
        ("ties(a, 'x y')", "no adapter 'x y'", "        ^~~~~"),
        ("a + @a", "no composition 'a' in the hub", "     ^"),
        ("arrow(a, zzz)", "no adapter 'zzz'", "         ^~~"),
    ],
)
@pytest.mark.parametrize("call", ["merge", "identity", "adapters", "pool"])
def test_what_is_not_in_the_hub_is_shown_in_the_formula_with_near_misses(hub, text, problem, place, call):
    hub.add(adapter(5), name="hello")
    formula = lw.parse(text)
    if call == "merge" and text.startswith("arrow"):
        call = "mixture"
    with pytest.raises(FormulaError, match=problem) as caught:
        getattr(formula, call)(hub)
    assert str(caught.value).split("\n")[1:] == [f"  {text}", f"  {place}"]


def test_what_is_not_in_a_pool_is_shown_and_versions_need_the_hub(hub, pool):
    with pytest.raises(FormulaError, match=r"(?s)no expert 'd' in the pool.*\n  a \+ d\n      \^$"):
        lw.parse("a + d").merge(pool)
    for text in ("a@1", "@kept"):
        with pytest.raises(FormulaError, match="versions and compositions are a hub's: pass the hub"):
            lw.parse(text).merge(pool)


def test_a_hub_is_asked_for_what_it_refuses(hub):
    hub.quarantine("a")
    with pytest.raises(AdapterQuarantined):
        merged("a + b", hub)
    with pytest.raises(WeightingError, match="not of 5"):
        merged("a + b", 5)


def test_licenses_are_those_of_lw_merge_also_inside(hub):
    for name, license in zip("abc", ("MIT", "Apache-2.0", "CC-BY-ND-4.0"), strict=True):
        hub.update(name, license=license)
    assert merged("ties(a, b)", hub).card["license"] == "Apache-2.0 AND MIT"
    for text in ("a + 0.5*c", "a + ties(b, c)", "0.5*c"):
        with pytest.raises(InvalidLicense, match="permits no work derived"):
            merged(text, hub)
        assert "CC-BY-ND-4.0" in merged(text, hub, allow_licenses=True).card["license"]
    assert merged("c", hub).hash == hub["c"].hash


def test_heads_are_refused_or_averaged_and_none_is_the_first(hub):
    heads = [replace(hub[name], heads={"score.weight": torch.full((2,), float(number))}) for number, name in enumerate("ab")]
    with pytest.raises(CompositionError, match="trained heads"):
        merged("a + 3*b", heads)
    assert merged("a + 3*b", heads, heads="average").heads["score.weight"].tolist() == [0.75, 0.75]
    with pytest.raises(WeightingError, match="a formula has no first adapter"):
        merged("a + 3*b", heads, heads="first")


def test_the_identity_is_of_contents_and_weights_not_of_names_and_spellings(hub):
    def identity(text):
        return lw.parse(text).identity(hub)

    one = identity("0.7*a + 0.3*b")
    assert one == identity(".3*b + 0.70*a") == identity("0.7*a@2 + 0.3*b@1")
    assert (
        len({one, identity("0.3*a + 0.7*b"), identity("a@1"), identity("a"), identity("ties(a, b)"), identity("base")}) == 6
    )
    hub.rename("b", "zebra")
    assert identity("0.7*a + 0.3*zebra") == one
    hub.add(adapter(0), name="same as a")
    assert identity("'same as a' - 3*a") == identity("-2*a")
    assert identity("arrow(a, c)") == identity("arrow('same as a', c)") != identity("arrow(a, c; top_k=1)")


def test_an_adapter_that_changes_makes_every_formula_with_it_another(hub):
    texts = ("a + b", "ties(a, b)", "0.1*ties(0.5*a, 0.2*b) + c", "arrow(a, b)")
    before = [lw.parse(text).identity(hub) for text in texts]
    pools = [lw.parse(text).pool(hub) for text in texts]
    hub.add(adapter(7), name="b", replace=True)
    after = [lw.parse(text).identity(hub) for text in texts]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False] * 4
    assert [lw.parse(text).identity(pool) for text, pool in zip(texts, pools, strict=True)] == before
    hub.rollback("b", 1)
    assert [lw.parse(text).identity(hub) for text in texts] == before


def test_formulas_cannot_be_changed_and_show_themselves(tmp_path):
    formula = lw.parse("b + 1*a")
    with pytest.raises(AttributeError):
        formula.root = None
    assert (repr(formula), str(formula)) == ("Formula('a + b')", "a + b")
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FormulaError, match="holds something that is not a formula"):
        formula.save_pretrained(tmp_path)
