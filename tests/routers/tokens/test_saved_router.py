from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from rounding import assert_near, num_terms
from safetensors.torch import load_file, save_file

from loraweave.composer.composer import Composer
from loraweave.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterUnsupported,
    BaseModelMismatch,
    LayerMismatch,
    ScopeError,
    TrainingError,
    UnknownName,
    WeightingError,
)
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.tokens._saved import router, router_class, router_names
from loraweave.routers.tokens._text import TextRouter
from loraweave.routers.tokens.arrow import Arrow

# of an expert that there is not, of none, of one that is named twice, of a strange kind, of another form
LAYERS_OF_NONE = [
    [16, 61, "linear", [3]],
    [16, 61, "linear", []],
    [16, 61, "linear", [1, 2, 1]],
    [16, 61, "strange", [0]],
    [16, "x"],
]
IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [3, 4, 7, 8, 3]])


@pytest.fixture
def folder(pool, tmp_path):
    """Of a saved Arrow."""
    return router("arrow", pool).save_pretrained(tmp_path / "router")


def put_tensors(folder, tensors):
    """Other tensors, whose checksum router.json has."""
    save_file(tensors, folder / "router.safetensors")
    changed(folder, sha256=hashlib.sha256((folder / "router.safetensors").read_bytes()).hexdigest())


def logits(model, pool, mixture):
    with torch.no_grad(), Composer(model, pool).activate(mixture):
        return model(IDS_BT).logits


def changed(folder, **fields):
    path = folder / "router.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_router_with_its_pool_is_one_folder(tiny_llama, pool, tmp_path):
    pool = ExpertPool({"../a b": pool["a"], "": pool["b"], "c/d": pool["c"]})
    arrow = router("arrow", pool, top_k=2)
    folder = arrow.save_pretrained(tmp_path / "router", pool=pool)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {path.split("/")[0] for path in files} == {"adapters", "router.json", "router.safetensors"}
    assert {path.split("/")[1] for path in files if path.startswith("adapters")} == {"0", "1", "2"}
    again = router(folder)
    assert again.pool.names == pool.names
    assert torch.equal(logits(tiny_llama, again.pool, again), logits(tiny_llama, pool, arrow))
    again.save_pretrained(folder)
    assert router(folder).pool is None


def test_experts_are_known_by_their_content_under_other_names(tiny_llama, pool, tmp_path):
    arrow = router("arrow", pool)
    folder = arrow.save_pretrained(tmp_path / "router")
    renamed = ExpertPool({"third": pool["c"], "first": pool["a"], "second": pool["b"]})
    again = router(folder, renamed)
    assert_near(logits(tiny_llama, renamed, again), logits(tiny_llama, pool, arrow), num_terms(tiny_llama))
    # saved, it is the router that it was made of
    assert router(again.save_pretrained(tmp_path / "again", pool=renamed)).pool.names == pool.names


def test_a_pool_without_some_of_the_experts_is_refused_with_the_differences(tiny_llama, pool, make_adapter, folder):
    other = make_adapter(tiny_llama, "b", rank=2, targets=("o_proj",), seed=99)
    with pytest.raises(WeightingError) as raised:
        router(folder, ExpertPool({"c": pool["c"], "b": other, "d": other}))
    for words in ("missing from the pool: 'a'", "of other content there: 'b'", "not known to the router: 'd'", "o_proj"):
        assert words in str(raised.value)


def test_a_pool_of_another_base_is_refused(pool, folder):
    with pytest.raises(BaseModelMismatch, match="another base model than the pool's"):
        router(folder, [replace(adapter, base_model="other") for adapter in pool.adapters.values()])


def test_two_experts_of_one_content_are_each_their_own(tiny_llama, pool, tmp_path):
    twice = ExpertPool({"a": pool["a"], "same": pool["a"], "c": pool["c"]})
    folder = router("arrow", twice).save_pretrained(tmp_path / "router")
    assert router(folder, twice).experts == twice.names
    with pytest.raises(WeightingError, match="missing from the pool: 'same'"):
        router(folder, pool)


def test_a_folder_without_a_router_is_refused(tmp_path, pool):
    with pytest.raises(AdapterNotFound, match=r"is not a router: it has no router\.json, and holds nothing"):
        router(tmp_path)
    with pytest.raises(AdapterNotFound, match="no folder"):
        router(tmp_path / "gone")
    with pytest.raises(UnknownName, match="did you mean 'arrow'"):
        router("arow", pool)
    with pytest.raises(WeightingError, match="leave out top_k"):
        router(router("arrow", pool).save_pretrained(tmp_path / "router"), top_k=1)


def test_a_newer_format_is_refused(folder):
    changed(folder, format=2)
    with pytest.raises(AdapterUnsupported, match="newer version of loraweave"):
        router(folder)


def test_a_withdrawn_router_is_refused_with_the_way_out_by_name_and_as_a_folder(pool, folder):
    refused = r"no router 'mass': it was withdrawn, .*make 'arrow' or 'spectr' of the same adapters.*adapters/0"
    with pytest.raises(UnknownName, match=refused):
        router("mass", pool)
    changed(folder, router="mass")
    with pytest.raises(UnknownName, match=refused):
        router(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "1"},
        {"members": {}},
        {"members": None},
        {"options": [1]},
        {"options": {"top_k": 2, "colour": "red"}},
        {"adapters": 2},
        {"adapters": 3},
        {"sha256": "0" * 64},
        {"report": 3},
    ],
)
def test_a_damaged_recipe_is_refused(fields, folder):
    changed(folder, **fields)
    with pytest.raises(AdapterCorrupt):
        router(folder)


@pytest.mark.parametrize("routed", LAYERS_OF_NONE)
def test_layers_of_no_expert_or_kind_are_refused(routed, folder):
    members = json.loads((folder / "router.json").read_text())["members"]
    changed(folder, members={**members, "layers": {**members["layers"], "lm_head": routed}})
    with pytest.raises(AdapterCorrupt, match="is damaged"):
        router(folder)


@pytest.mark.parametrize(
    "name", [name for name in ("average_activation", "hard_routed", "phatgoose", "xlora") if name in router_names()]
)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_memory_is_taken(name, tmp_path, pool):
    folder = router(name, pool).save_pretrained(tmp_path / "router")
    recipe = json.loads((folder / "router.json").read_text())
    layers = {layer: [2**44, 2**44, kind, experts] for layer, (*_, kind, experts) in recipe["members"]["layers"].items()}
    options = recipe["options"] | ({"hidden_size": 2**44} if name == "xlora" else {})
    changed(folder, members={**recipe["members"], "layers": layers}, options=options)
    with pytest.raises(AdapterCorrupt, match=r"asks for a router of \d+ bytes"):
        router(folder)


def test_damaged_tensors_are_refused(folder):
    path = folder / "router.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-8])
    with pytest.raises(AdapterCorrupt, match=r"router\.safetensors"):
        router(folder)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(AdapterCorrupt, match="SHA-256"):
        router(folder)
    path.unlink()
    with pytest.raises(AdapterCorrupt, match=r"cannot open router\.safetensors"):
        router(folder)


def test_tensors_of_layers_that_no_expert_updates_are_refused(folder):
    tensors = load_file(folder / "router.safetensors")
    put_tensors(folder, {**tensors, "directions_.lm_tail": torch.zeros(3, 16)})
    with pytest.raises(AdapterCorrupt, match="'lm_tail', which no expert updates"):
        router(folder)
    put_tensors(folder, {**tensors, "strange": torch.zeros(3)})
    with pytest.raises(AdapterCorrupt, match="strange"):
        router(folder)


@pytest.mark.parametrize("name", ["arrow", "mole"])
def test_numbers_that_are_not_finite_and_layers_without_any_are_refused(name, tmp_path, pool):
    folder = router(name, pool).save_pretrained(tmp_path / "router")
    tensors = load_file(folder / "router.safetensors")
    of_factors = next(key for key in tensors if key.startswith(("directions_", "cores_")))
    for damaged, said in (
        ({key: tensors[key] for key in tensors if key != of_factors}, "no tensor for layer"),
        ({**tensors, of_factors: tensors[of_factors] / 0}, "not finite"),
    ):
        put_tensors(folder, damaged)
        with pytest.raises(AdapterCorrupt, match=said):
            router(folder)


def test_a_file_with_keys_of_other_experts_is_refused(tmp_path, pool):
    texts = {name: ["red apple", "green apple"] for name in pool.names}
    folder = router("similarity", pool, examples=texts, embedder="hashing").save_pretrained(tmp_path / "router")
    tensors = load_file(folder / "router.safetensors")
    put_tensors(folder, tensors | {"keys_": tensors["keys_"][:2].clone()})
    with pytest.raises(AdapterCorrupt, match="keys_ has 2 rows, but there are 3 experts"):
        router(folder)


@pytest.mark.parametrize("name", ["", None, 3])
def test_what_is_no_name_is_refused(name, pool):
    with pytest.raises(UnknownName, match="is not a router; give one"):
        router(name, pool)


def test_what_is_no_pool_is_refused(pool):
    with pytest.raises(WeightingError, match="not of 3"):
        router("arrow", 3)
    with pytest.raises(WeightingError, match="one of them is 'x'"):
        router("arrow", pool).onto("x")


def test_a_router_is_put_onto_a_list_of_adapters_too(pool):
    turned = [pool["c"], pool["a"], pool["b"]]
    assert router("arrow", pool).onto(turned).experts == ("c", "a", "b")


def test_an_adapter_of_other_content_in_the_folder_is_refused(tmp_path, pool):
    folder = router("arrow", pool).save_pretrained(tmp_path / "router", pool=pool)
    pool["a"].save_pretrained(folder / "adapters" / "1")
    with pytest.raises(AdapterCorrupt, match="is not expert 'b' as the router knows it"):
        router(folder)


def test_adapters_outside_of_the_folder_are_not_read(tmp_path, pool):
    folder = router("arrow", pool).save_pretrained(tmp_path / "router", pool=pool)
    (folder / "adapters").rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterCorrupt, match="has no folder 'adapters/0'"):
        router(folder)
    (folder / "adapters").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterCorrupt, match="has no folder 'adapters/0'"):
        router(folder)


def test_a_folder_with_something_else_is_left_alone(tmp_path, pool):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(WeightingError, match="holds something that is not a router"):
        router("arrow", pool).save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_a_pool_without_the_experts_is_not_saved_with_it(tmp_path, pool):
    with pytest.raises(WeightingError, match="missing from the pool: 'b'"):
        router("arrow", pool).save_pretrained(tmp_path / "router", pool=pool.without("b"))
    assert not list(tmp_path.iterdir())


def test_a_class_that_no_file_of_routers_has_is_not_saved(tmp_path, pool):
    class Own(Arrow):
        pass

    with pytest.raises(ScopeError, match="router Own is in no file of routers/"):
        Own(pool).save_pretrained(tmp_path / "router")


def test_how_it_was_trained_is_kept(tmp_path, pool):
    arrow = router("arrow", pool)
    arrow.report = {"steps": 3, "losses": [1.0, 0.5]}
    assert router(arrow.save_pretrained(tmp_path / "router")).report == arrow.report
    arrow.report = {"losses": [float("nan"), 0.5]}
    assert router(arrow.save_pretrained(tmp_path / "router")).report == {"losses": [None, 0.5]}


# those that derive all they know from the adapters alone
DERIVED = [
    name
    for name, made in {name: router_class(name) for name in router_names()}.items()
    if made.per_expert is not None and made.fit is TokenRouter.fit and not issubclass(made, TextRouter)
]


@pytest.mark.parametrize("name", DERIVED)
def test_a_router_grows_to_what_one_for_the_larger_pool_is(name, tiny_llama, pool, make_adapter):
    new = make_adapter(tiny_llama, "new", rank=3, targets=("q_proj", "o_proj"))
    options = {"top_k": 2} if "top_k" in router_class(name).counts else {}
    larger = pool.including("new", new)
    grown, whole = router(name, pool, **options).add_expert("new", new), router(name, larger, **options)
    assert grown.experts == whole.experts
    assert grown.members.to_json() == whole.members.to_json()
    states = [{key: value.tolist() for key, value in each.state_dict().items()} for each in (grown, whole)]
    assert states[0] == states[1]
    smaller = router(name, larger, **options).remove_expert("b")
    fresh = router(name, larger.without("b"), **options)
    assert smaller.members.to_json() == fresh.members.to_json()
    assert torch.equal(logits(tiny_llama, larger.without("b"), smaller), logits(tiny_llama, larger.without("b"), fresh))


def test_a_running_engine_grows_with_its_router(tiny_llama, pool, make_adapter):
    engine = Composer(tiny_llama, pool)
    arrow = router("arrow", pool)
    new = make_adapter(tiny_llama, "new", rank=3, targets=("q_proj",))
    engine.load("new", new)
    with pytest.raises(WeightingError, match="in this order"), engine.activate(arrow):
        pass
    arrow = arrow.add_expert("new", new)
    with torch.no_grad(), engine.activate(arrow):
        tiny_llama(IDS_BT)
    engine.unload("a")
    with torch.no_grad(), engine.activate(arrow.remove_expert("a")):
        tiny_llama(IDS_BT)


def test_an_expert_that_does_not_go_with_the_others_does_not_join(pool):
    arrow = router("arrow", pool)
    with pytest.raises(WeightingError, match="an expert 'a' already"):
        arrow.add_expert("a", pool["b"])
    with pytest.raises(BaseModelMismatch, match="another base model than the router's"):
        arrow.add_expert("new", replace(pool["a"], base_model="other"))
    wider = {layer: replace(f, a_RI=torch.ones(1, 99)) for layer, f in pool["a"].layers.items()}
    with pytest.raises(LayerMismatch, match="99"):
        arrow.add_expert("new", replace(pool["a"], layers=wider))
    with pytest.raises(KeyError, match="no expert 'z'"):
        arrow.remove_expert("z")
    with pytest.raises(WeightingError, match="the only expert"):
        arrow.remove_expert("a").remove_expert("b").remove_expert("c")


def test_a_router_on_another_pool_neither_grows_nor_shrinks(pool):
    turned = router("arrow", pool).onto(pool.subset(["c", "a", "b"]))
    with pytest.raises(ScopeError):
        turned.add_expert("new", pool["a"])


def test_a_router_on_another_pool_is_not_trained(tiny_llama, pool):
    larger = ExpertPool({"x": pool["a"], **pool.adapters})
    turned = router("mole", pool).onto(larger)
    with pytest.raises(TrainingError, match="fit\\(\\) it in an engine of its own pool"):
        Composer(tiny_llama, larger).fit(turned, [("a", "b")])


def test_the_router_for_its_own_pool_is_itself(pool):
    arrow = router("arrow", pool)
    assert arrow.onto(pool) is arrow
