"""A package adds a method, router, recipe, key, embedder, index, kernel or format by one file and one line each."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave import registry
from loraweave.composer.live import row_weights
from loraweave.composer.live.kernels import _parts
from loraweave.errors import PluginFailed, UnknownName

FILES = {
    "guest_method": """
from loraweave.composer.merge.methods.linear import linear
def guest_method(experts, weights, *, factor: float = 1.0):
    "The sum, times a factor."
    return linear(experts, [factor * weight for weight in weights])
""",
    "guest_router": """
import torch
from loraweave.routers.tokens._router import TokenRouter
class GuestRouter(TokenRouter):
    "The same weight for every expert."
    def __init__(self, pool, *, each: float = 0.5):
        super().__init__(pool)
        self.each = each
    def weights(self, x_BTI, layer):
        return torch.full((*x_BTI.shape[:2], len(self.experts)), self.each)
""",
    "guest_recipe": """
from dataclasses import dataclass
from loraweave.routers.recipes.mixtral import Mixtral
@dataclass(frozen=True, kw_only=True)
class GuestRecipe(Mixtral):
    "One expert a token."
    top_k: int = 1
""",
    "guest_key": """
import numpy as np
class GuestKey:
    "How many letters of the name the first input begins with."
    def scores(self, query, records, space):
        return np.array([float(record.name == query.inputs[0]) for record in records])
""",
    "guest_embedder": """
from loraweave.hub.embedders.hashing import Hashing
class GuestEmbedder(Hashing):
    "Spelling, in fewer numbers."
    def __init__(self):
        super().__init__(dim=32)
""",
    "guest_index": """
from loraweave.hub.indexes.flat import Flat
class GuestIndex(Flat):
    "Every vector, one by one."
""",
    "guest_format": """
import torch
from loraweave.hub.formats._contents import Contents
from loraweave.types import Factors
class GuestFormat:
    "Rank one, from a text of two numbers."
    @staticmethod
    def recognises(folder, **asked):
        return (folder / "guest.txt").is_file()
    @staticmethod
    def read(folder, **asked):
        a, b = map(float, (folder / "guest.txt").read_text().split())
        return Contents("base", {"layer": Factors(torch.tensor([[a]]), torch.tensor([[b]]))})
""",
    "guest_kernel": """
from loraweave.composer.live.kernels._parts import Cost
from loraweave.composer.live.kernels.shared import Shared
class GuestKernel(Shared):
    "The shared product, at no cost."
    @staticmethod
    def cost(work):
        return Cost(0, 0, 0) if work.num_segments == 1 else None
""",
    "ties": "def ties(experts, weights): return None",
    "broken": "raise RuntimeError('no luck')",
}
POINTS = """
[loraweave.methods]
guest_method = guests.guest_method
ties = guests.ties
broken = guests.broken
other_name = guests.guest_method
[loraweave.routers]
guest_router = guests.guest_router:GuestRouter
[loraweave.recipes]
guest_recipe = guests.guest_recipe
[loraweave.keys]
guest_key = guests.guest_key
[loraweave.embedders]
guest_embedder = guests.guest_embedder
[loraweave.indexes]
guest_index = guests.guest_index
[loraweave.kernels]
guest_kernel = guests.guest_kernel
[loraweave.formats]
guest_format = guests.guest_format
"""


@pytest.fixture(autouse=True)
def guests(tmp_path, monkeypatch):
    """The package, as pip would have put it on the path."""
    package, about = tmp_path / "guests", tmp_path / "guests-1.0.dist-info"
    package.mkdir()
    about.mkdir()
    for name, text in {"__init__": "", **FILES}.items():
        (package / f"{name}.py").write_text(text)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: guests\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    # a process asks once which kernels there are
    for name in ("kernels_with", "row_kernels", "choose"):
        afresh = getattr(_parts, name).__wrapped__
        for module in (_parts, row_weights):
            monkeypatch.setattr(module, name, afresh, raising=module is _parts)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "guests"]:
        del sys.modules[name]


def guests_loaded():
    return {name for name in sys.modules if name.startswith("guests.")}


def test_listing_names_imports_nothing_of_a_package():
    assert "guest_method" in lw.names("methods")
    assert "guest_recipe" in lw.names("experts")
    assert guests_loaded() == set()


def test_a_method_merges_with_its_options(make_adapter, tiny_llama):
    a, b = make_adapter(tiny_llama, "a", seed=0), make_adapter(tiny_llama, "b", seed=1)
    merged = lw.merge([a, b], [0.5, 0.25], method="guest_method", factor=2.0, progress=False)
    layer = next(iter(a.layers))
    assert torch.allclose(merged.delta(layer), a.delta(layer) + 0.5 * b.delta(layer), atol=1e-6)
    with pytest.raises(lw.WeightingError, match="no option 'facto', did you mean 'factor'"):
        lw.merge([a, b], method="guest_method", facto=2.0)


def test_a_router_routes_and_is_saved(make_adapters, tiny_llama, tmp_path):
    pool = lw.ExpertPool(make_adapters(tiny_llama, "llama"))
    made = lw.router("guest_router", pool, each=0.25)
    ids_BT = torch.tensor([[3, 9, 27]])
    with lw.Composer(tiny_llama, pool).activate(made):
        routed = tiny_llama(ids_BT).logits
    with lw.Composer(tiny_llama, pool).activate(dict.fromkeys(pool.names, 0.25)):
        assert torch.allclose(tiny_llama(ids_BT).logits, routed, atol=1e-5)
    made.save_pretrained(tmp_path / "router")
    assert lw.router(tmp_path / "router").each == 0.25


def test_a_recipe_trains_experts_and_is_saved(tiny_llama, tmp_path):
    with lw.experts("guest_recipe", tiny_llama, num_experts=2) as model:
        assert model.recipe.top_k == 1
        model.save_pretrained(tmp_path / "experts")
    with lw.experts(tmp_path / "experts", tiny_llama) as model:
        assert model.recipe.name == "guest_recipe"


def test_an_embedder_an_index_and_a_key_search_a_hub(make_adapter, tiny_llama, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub:
        for seed, name in enumerate(("plural", "negation")):
            hub.add(make_adapter(tiny_llama, name, seed=seed), description=f"makes a {name}", examples=["x"])
        found = lw.Retriever(hub, embedder="guest_embedder", index="guest_index").candidates("makes a plural", k=1)
        assert [hit.name for hit in found] == ["plural"]
        keyed = lw.Retriever(hub, embedder="hashing", keys=["guest_key"])
        assert [hit.name for hit in keyed.for_examples([("negation", "y")], k=1)] == ["negation"]


def test_a_kernel_is_chosen_where_it_costs_least(make_adapters, tiny_llama):
    engine = lw.Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
    for weights, names in (({"a": 1.0}, {"guest_kernel"}), ([{"a": 1.0}, {"a": 2.0}], {"dense", "gathered", "native_rows"})):
        with engine.activate(weights):
            tiny_llama(torch.tensor([[3, 9, 27], [4, 8, 16]]))
        # of ours, that which this machine runs
        found = {used.kernel for used in engine.last_weights.layers.values()} - {""}
        assert len(found) == 1
        assert found <= names


def test_a_format_is_read(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "guest.txt").write_text("2 3")
    np.testing.assert_array_equal(lw.Adapter.from_pretrained(folder).delta("layer"), [[6.0]])


def test_a_name_of_ours_stays_ours():
    assert registry.get("methods", "ties").__module__ == "loraweave.composer.merge.methods.ties"
    assert registry.modules("methods")["ties"] == "loraweave.composer.merge.methods.ties"


def test_a_file_that_cannot_be_imported_is_named_with_its_package():
    with pytest.raises(PluginFailed, match=r"method 'broken' of package 'guests' \(guests\.broken\).*no luck"):
        registry.get("methods", "broken")


def test_a_file_of_another_name_is_refused():
    with pytest.raises(PluginFailed, match=r"'other_name'.*another name than its file"):
        registry.get("methods", "other_name")


def test_near_misses_name_what_packages_bring():
    with pytest.raises(UnknownName, match="did you mean 'guest_method'"):
        registry.get("methods", "guest_metod")


def test_any_function_of_a_methods_signature_merges(make_adapter, tiny_llama):
    from loraweave.composer.merge.methods.linear import linear

    def halved(experts, weights, *, share: float = 0.5):
        return linear(experts, [share * weight for weight in weights])

    a, b = make_adapter(tiny_llama, "a", seed=0), make_adapter(tiny_llama, "b", seed=1)
    merged, layer = lw.merge([a, b], [1.0, 1.0], method=halved, progress=False), next(iter(a.layers))
    assert torch.allclose(merged.delta(layer), 0.5 * (a.delta(layer) + b.delta(layer)), atol=1e-6)
    assert merged.card["recipe"]["method"] == "halved"
    with pytest.raises(lw.WeightingError, match="method 'halved' has no option 'shar', did you mean 'share'"):
        lw.merge([a, b], method=halved, shar=1.0)
    with pytest.raises(lw.WeightingError, match=r"method 'one' takes \(experts\); a method takes experts and weights first"):
        lw.merge([a, b], method=lambda_named("one"))
    with pytest.raises(lw.CompositionError, match="method 'wrong' gave a Tensor for layer"):
        lw.merge([a, b], method=wrong, progress=False)


def lambda_named(name):
    def one(experts):
        return None

    one.__name__ = name
    return one


def wrong(experts, weights):
    return torch.ones(2)
