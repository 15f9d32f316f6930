"""Folders that PEFT saves of its X-LoRA and of its Arrow open as routers, and give PEFT's logits.

Both run in float64: the networks are drawn so that a processor's rounding in float32 moves logits by more than 1e-5.
"""

import copy
import json
import warnings
from itertools import product

import command_line
import pytest
import torch
from safetensors.torch import load_file, save_file

import loraweave as lw
from loraweave.errors import AdapterCorrupt, AdapterExists, AdapterUnsupported, HubError, WeightingError
from loraweave.extensions.routers import save_as_peft
from loraweave.hub.formats._config import CONFIG

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated:FutureWarning"
)

TARGETS = ("q_proj", "v_proj", "down_proj")
IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [7, 8, 3, 30, 1]])


@pytest.fixture
def adapters(make_model, make_adapter):
    return [make_adapter(make_model("llama"), str(n), rank=3, targets=TARGETS, seed=n) for n in range(3)]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS_BT).logits


def ours(make_model, router, pool=None):
    model = make_model("llama").double()
    with lw.Composer(model, pool or router.pool).activate(copy.deepcopy(router).double()):
        return logits(model)


def xlora_folder(make_model, adapters, folder, *, size=0.5, **settings):
    """The folder of an X-LoRA with its network whole, as PEFT before 0.21 writes it, and PEFT's logits with it."""
    paths = {adapter.name: str(adapter.save_pretrained(folder / "apart" / adapter.name)) for adapter in adapters}
    base = make_model("llama")
    base.config.use_cache = False
    with warnings.catch_warnings():
        # that its own defaults are not the best
        warnings.simplefilter("ignore")
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=paths, **settings)
        made = peft.get_peft_model(base, config)
        made.save_pretrained(folder / "saved", selected_adapters=["default"])
        torch.manual_seed(2)
        network = {name: size * torch.randn(t.shape) for name, t in made.internal_xlora_classifier.state_dict().items()}
        tensors = {f"base_model.internal_xlora_classifier.{name}": tensor for name, tensor in network.items()}
        save_file(tensors, folder / "saved" / "adapter_model.safetensors")
    return folder / "saved", pefts(make_model, folder / "saved")


def peft_model(make_model, folder):
    """PEFT's X-LoRA in a folder."""
    base = make_model("llama")
    base.config.use_cache = False
    with warnings.catch_warnings():
        # that its own defaults are not the best
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).eval().double()


def pefts(make_model, folder):
    """The logits of PEFT's X-LoRA in a folder."""
    return logits(peft_model(make_model, folder))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"xlora_depth": 3, "xlora_size": 6},
        {"xlora_depth": 2, "xlora_size": 6, "xlora_dropout_p": 0.0, "softmax_temperature": 0.5},
        {"top_k_lora": 2},
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True, "softmax_temperature": 0.5},
        {"top_k_lora": 2, "enable_softmax_topk": True, "global_scaling_weight": 0.6},
        {"enable_softmax": False},
        {"scaling_pass_value": 0.3},
        {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 6},
    ],
    ids=lambda settings: ", ".join(settings) or "as it comes",
)
def test_an_xlora_that_peft_saved_gives_pefts_logits(make_model, adapters, tmp_path, settings):
    folder, expected = xlora_folder(make_model, adapters, tmp_path, **settings)
    router = lw.router(folder, adapters, model=make_model("llama"))
    torch.testing.assert_close(ours(make_model, router), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(make_model("llama").double()), expected, atol=1e-2)


# (enable_softmax, enable_softmax_topk), top_k_lora, scaling_pass_value, global_scaling_weight, softmax_temperature
GRID = list(product(product((True, False), repeat=2), (None, 1, 2, 3), (0.0, 0.3), (1.0, -0.5), (1.0, 0.5)))


@pytest.mark.parametrize(
    "network",
    [{"use_trainable_adapters": True}, {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 6}],
    ids=["shared by layers", "by layer"],
)
def test_every_combination_of_options_gives_pefts_logits(make_model, adapters, tmp_path, network):
    folder, _ = xlora_folder(make_model, adapters, tmp_path, **network)
    config = json.loads((folder / CONFIG).read_text())
    base, model = make_model("llama"), make_model("llama").double()
    theirs = peft_model(make_model, folder)
    classifier = theirs.internal_xlora_classifier
    for (softmax, softmax_top_k), top_k, scaling_pass_value, global_scaling, temperature in GRID:
        settings = {
            "enable_softmax": softmax,
            "enable_softmax_topk": softmax_top_k,
            "top_k_lora": top_k,
            "scaling_pass_value": scaling_pass_value,
            "global_scaling_weight": global_scaling,
            "softmax_temperature": temperature,
        }
        # PEFT takes these two from its config when it is made, and the others when it runs
        vars(classifier.config).update(settings)
        classifier.softmax.temperature = temperature
        theirs.set_scaling_pass_value(scaling_pass_value)
        expected = logits(theirs)
        (folder / CONFIG).write_text(json.dumps({**config, **settings}))
        router = lw.router(folder, adapters, model=base)
        with lw.Composer(model, router.pool).activate(router.double()):
            found = logits(model)
        # each layer of the two blocks sums at most 24 products in float64, in two passes: not 10^4 roundings on the way
        bound = 1e4 * torch.finfo(torch.float64).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected, atol=bound, rtol=0.0, msg=f"{settings}: {{}}".format)
    # what was set is what PEFT reads from the folder
    torch.testing.assert_close(expected, pefts(make_model, folder), atol=bound, rtol=0.0)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        # logits of 0 alone
        (0.0, {"enable_softmax": False, "enable_softmax_topk": True}),
        # a first softmax of 1 and zeros
        (0.5, {"enable_softmax_topk": True, "top_k_lora": 2, "softmax_temperature": 1e-4}),
    ],
    ids=["logits", "probabilities"],
)
def test_zeros_are_left_out_of_the_softmax_of_the_chosen_as_in_peft(make_model, adapters, tmp_path, size, settings):
    folder, expected = xlora_folder(make_model, adapters, tmp_path, size=size, **settings)
    torch.testing.assert_close(ours(make_model, lw.router(folder, adapters)), expected, atol=1e-9, rtol=0.0)


def test_the_adapters_are_taken_by_name_or_in_their_order_or_from_the_folder(make_model, adapters, tmp_path):
    folder, expected = xlora_folder(make_model, adapters, tmp_path)
    named = lw.ExpertPool([adapters[2], adapters[0], adapters[1]])
    placed = dict(zip("xyz", adapters, strict=True))
    for pool in (named, placed):
        torch.testing.assert_close(ours(make_model, lw.router(folder, pool), pool), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterUnsupported, match=r"not in it .* what a file names is not opened: pass them"):
        lw.router(folder)
    for adapter in adapters:
        adapter.save_pretrained(folder / adapter.name)
    torch.testing.assert_close(ours(make_model, lw.router(folder)), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(WeightingError, match="the pool has 2 others"):
        lw.router(folder, adapters[:2])


def test_a_network_that_is_not_whole_is_refused_and_the_cause_named(make_model, adapters, tmp_path):
    folder, _ = xlora_folder(make_model, adapters, tmp_path, xlora_depth=2, xlora_size=6)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    # what PEFT 0.21 itself leaves of it
    save_file({name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}, path)
    with pytest.raises(AdapterCorrupt, match=r"PEFT 0\.21 leaves out of the file"):
        lw.router(folder, adapters)
    save_file({**tensors, "base_model.internal_xlora_classifier.layers.0.bias": torch.full((6,), torch.nan)}, path)
    with pytest.raises(AdapterCorrupt, match="NaN"):
        lw.router(folder, adapters)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"some_future_field": 3}, AdapterUnsupported, "some_future_field"),
        ({"adapters": {}}, AdapterCorrupt, "not from 1 to"),
        ({"xlora_depth": 0}, AdapterCorrupt, "xlora_depth"),
        ({"hidden_size": 10**9}, AdapterCorrupt, "asks for"),
        ({"layerwise_scalings": True}, AdapterCorrupt, "asks for"),
        ({"enable_softmax": "yes"}, AdapterCorrupt, "enable_softmax"),
        ({"top_k_lora": 4}, AdapterCorrupt, "top_k_lora"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(make_model, adapters, tmp_path, fields, error, message):
    folder, _ = xlora_folder(make_model, adapters, tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    with pytest.raises(error, match=message):
        lw.router(folder, adapters)


def test_adapters_of_different_layers_and_layerwise_ones_without_the_base_are_refused(
    make_model, make_adapter, adapters, tmp_path
):
    other = make_adapter(make_model("llama"), "2", rank=3, targets=("q_proj",), seed=2)
    folder, _ = xlora_folder(make_model, [*adapters[:2], other], tmp_path / "a")
    with pytest.raises(AdapterUnsupported, match="'0' and '2' update other layers"):
        lw.router(folder, [*adapters[:2], other])
    folder, _ = xlora_folder(make_model, adapters, tmp_path / "b", layerwise_scalings=True)
    with pytest.raises(AdapterUnsupported, match="pass the base"):
        lw.router(folder, adapters)


def arrow_folder(make_model, adapters, general, folder, *, after=False, **settings):
    """What create_arrow_model saves, and PEFT's logits."""
    from peft.tuners.lora.arrow import create_arrow_model

    paths = [str(adapter.save_pretrained(folder / "apart" / adapter.name)) for adapter in adapters]
    others = [str(adapter.save_pretrained(folder / "apart" / adapter.name)) for adapter in general]
    config = peft.ArrowConfig(top_k=2, router_temperature=0.6, use_gks=bool(general), **settings)
    model = create_arrow_model(make_model("llama"), paths, config, others or None).eval()
    with warnings.catch_warnings():
        # no model hub has a tiny model, whose vocabulary PEFT would like to know
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "saved")
    return folder / "saved", logits(model.double())


@pytest.mark.parametrize("num_general", [0, 2])
def test_an_arrow_that_peft_saved_gives_pefts_logits(make_model, make_adapter, adapters, tmp_path, num_general):
    base = make_model("llama")
    general = [make_adapter(base, f"g{n}", rank=3, targets=TARGETS, seed=10 + n) for n in range(num_general)]
    folder, expected = arrow_folder(make_model, adapters, general, tmp_path, rng_seed=5)
    router = lw.router(folder)
    assert router.experts == ("task_0", "task_1", "task_2")
    torch.testing.assert_close(ours(make_model, router), expected, atol=1e-5, rtol=1e-5)
    kept = router.save_pretrained(tmp_path / "kept", pool=router.pool)
    torch.testing.assert_close(ours(make_model, lw.router(kept)), expected, atol=1e-5, rtol=1e-5)


def test_an_arrow_without_a_seed_is_the_one_that_peft_tends_to(make_model, adapters, tmp_path):
    folder, _ = arrow_folder(make_model, adapters, [], tmp_path)
    with pytest.warns(UserWarning, match="rng_seed is null"):
        router = lw.router(folder)
    assert router.direction == "exact"


def test_an_arrow_names_no_folder_outside_its_own(make_model, adapters, tmp_path):
    folder, _ = arrow_folder(make_model, adapters, [], tmp_path, rng_seed=5)
    path = folder / "arrow_router" / CONFIG
    config = json.loads(path.read_text())
    config["arrow_config"]["task_adapter_names"][0] = "../apart/0"
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterUnsupported, match=r"'\.\./apart/0', which is not task_ and a number"):
        lw.router(folder)
    config["arrow_config"]["task_adapter_names"][0] = "task_7"
    path.write_text(json.dumps(config))
    (folder / "task_7").symlink_to(tmp_path / "apart" / "0")
    with pytest.raises(AdapterCorrupt, match="no folder 'task_7' in it"):
        lw.router(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2, "depth": 2, "size": 6},
        {"top_k": 2, "softmax": "twice", "temperature": 0.5, "depth": 3, "size": 6, "dropout": 0.0},
        {"softmax": "none", "global_scaling": 0.6},
        {"layerwise": True, "depth": 2, "size": 6},
        {"top_k": 2, "softmax": "all", "scaling_pass_value": 0.3, "as_peft": True},
        {"softmax": "top_k", "scaling_pass_value": 0.3, "as_peft": True},
        {"softmax": "none", "scaling_pass_value": 0.3},
    ],
    ids=str,
)
def test_our_xlora_is_written_as_pefts_and_gives_our_logits_there(make_model, adapters, tmp_path, options):
    pool, base = lw.ExpertPool(adapters), make_model("llama")
    torch.manual_seed(6)
    router = lw.router("xlora", pool, hidden_size=16, **options)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    expected = ours(make_model, router, pool)
    folder = save_as_peft(router, tmp_path / "written", pool, model=base)
    base.config.use_cache = False
    with warnings.catch_warnings():
        # that its own defaults are not the best
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(logits(theirs.double()), expected, atol=1e-5, rtol=1e-5)
    again = lw.router(folder, model=make_model("llama"))
    torch.testing.assert_close(ours(make_model, again), expected, atol=1e-5, rtol=1e-5)


def test_our_arrow_is_written_as_pefts_and_gives_our_logits_there(make_model, adapters, tmp_path):
    from peft.tuners.lora.arrow import create_arrow_model

    pool = lw.ExpertPool(adapters)
    router = lw.router("arrow", pool, top_k=2, temperature=0.6, direction="power_iteration", seed=5)
    expected = ours(make_model, router, pool)
    folder = save_as_peft(router, tmp_path / "written", pool)
    torch.testing.assert_close(ours(make_model, lw.router(folder)), expected, atol=1e-5, rtol=1e-5)
    said = json.loads((folder / "arrow_router" / CONFIG).read_text())["arrow_config"]
    names = said.pop("task_adapter_names")
    said.pop("gks_adapter_names")
    theirs = create_arrow_model(make_model("llama"), [str(folder / name) for name in names], peft.ArrowConfig(**said))
    torch.testing.assert_close(logits(theirs.double().eval()), expected, atol=1e-5, rtol=1e-5)


def test_what_pefts_layouts_cannot_hold_is_refused_by_name(make_model, make_adapter, adapters, tmp_path):
    pool, target = lw.ExpertPool(adapters), tmp_path / "written"
    with pytest.raises(AdapterUnsupported, match="direction='exact'"):
        save_as_peft(lw.router("arrow", pool), target, pool)
    warm = lw.router("xlora", pool, hidden_size=16, top_k=2, temperature=0.5)
    with pytest.raises(AdapterUnsupported, match=r"temperature=0\.5"):
        save_as_peft(warm, target, pool)
    passed = lw.router("xlora", pool, hidden_size=16, top_k=2, softmax="all", scaling_pass_value=0.3)
    with pytest.raises(AdapterUnsupported, match=r"scaling_pass_value=0\.3 for all adapters.*as_peft=True"):
        save_as_peft(passed, target, pool)
    with pytest.raises(AdapterUnsupported, match="pass model="):
        save_as_peft(lw.router("xlora", pool, hidden_size=16, layerwise=True), target, pool)
    base = make_model("llama")
    uneven = lw.ExpertPool([*adapters[:2], make_adapter(base, "2", rank=3, targets=("q_proj",), seed=2)])
    with pytest.raises(AdapterUnsupported, match="updated by some of the adapters only"):
        save_as_peft(lw.router("xlora", uneven, hidden_size=16), target, uneven)
    ranks = lw.ExpertPool([*adapters[:2], make_adapter(base, "2", rank=2, targets=TARGETS, seed=2)])
    with pytest.raises(AdapterUnsupported, match=r"of one rank, and these have the ranks \[2, 3\]"):
        save_as_peft(lw.router("arrow", ranks, direction="power_iteration"), target, ranks)
    with pytest.raises(AdapterUnsupported, match="like 'xlora' and 'arrow', and this is 'hard_routed'"):
        save_as_peft(lw.router("hard_routed", pool), target, pool)
    assert not target.exists()


def stored(tmp_path, put):
    """The router that a hub gives back from the formula that names it, after the hub into which it was put was closed."""
    with lw.Hub(tmp_path / "hub") as hub:
        assert put(hub).name == "mix"
        assert len(hub) == 0
    with lw.Hub(tmp_path / "hub") as hub:
        mix = lw.parse("@mix")
        router = mix.mixture(hub)
        assert mix.pool(hub).names == router.experts
        return router


@pytest.mark.parametrize("settings", [{}, {"layerwise_scalings": True}], ids=str)
def test_a_hub_keeps_an_xlora_that_peft_saved_and_gives_pefts_logits(make_model, adapters, tmp_path, settings):
    folder, expected = xlora_folder(make_model, adapters, tmp_path, **settings)
    base = make_model("llama")
    router = stored(tmp_path / "a", lambda hub: hub.save_composition("mix", lw.router(folder, adapters, model=base)))
    torch.testing.assert_close(ours(make_model, router), expected, atol=1e-5, rtol=1e-5)
    with lw.Hub(tmp_path / "b" / "hub") as hub:
        with pytest.raises(AdapterUnsupported, match=r"3 adapters, which are not in it .* lw\.router\(folder, pool="):
            hub.add(folder, name="mix", model=base)
        assert hub.compositions() == []
    for place, adapter in enumerate(adapters):
        adapter.save_pretrained(folder / str(place))
    router = stored(tmp_path / "b", lambda hub: hub.add(folder, name="mix", model=base))
    torch.testing.assert_close(ours(make_model, router), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_general", [0, 2])
def test_a_hub_keeps_an_arrow_that_peft_saved_and_gives_pefts_logits(
    make_model, make_adapter, adapters, tmp_path, num_general
):
    general = [make_adapter(make_model("llama"), f"g{n}", rank=3, targets=TARGETS, seed=10 + n) for n in range(num_general)]
    folder, expected = arrow_folder(make_model, adapters, general, tmp_path, rng_seed=5)
    router = stored(tmp_path, lambda hub: hub.add(folder.rename(tmp_path / "mix")))
    torch.testing.assert_close(ours(make_model, router), expected, atol=1e-5, rtol=1e-5)


def test_a_mixture_that_cannot_be_kept_whole_leaves_the_hub_as_it_was(make_model, make_adapter, adapters, tmp_path):
    folder, _ = arrow_folder(make_model, adapters, [], tmp_path, rng_seed=5)
    with lw.Hub(tmp_path / "hub") as hub:
        with pytest.raises(HubError, match=r"mixture of adapters.*which has no tags: leave it out"):
            hub.add(folder, tags=["x"])
        with pytest.raises(HubError, match="which has no description"):
            hub.add(folder, description="x", license="MIT")
        ((_, refused),) = hub.add_many([folder]).refused
        assert "hub.add(folder) keeps it" in str(refused)
        hub.add(folder, name="mix")
        again = hub.add(folder, name="mix")
        assert [each.hash for each in hub.compositions()] == [again.hash]
        other, _ = arrow_folder(make_model, adapters[:2], [], tmp_path / "other", rng_seed=5)
        with pytest.raises(AdapterExists, match="pass replace=True"):
            hub.add(other, name="mix")
        assert hub.add(other, name="mix", replace=True).hash != again.hash
        (other / "task_1" / "adapter_model.safetensors").write_bytes(b"damaged")
        with pytest.raises(AdapterCorrupt):
            hub.add(other, name="new")
        assert [each.name for each in hub.compositions()] == ["mix"]
        assert len(hub) == 0


def test_the_shell_keeps_what_peft_saved_with_its_adapters(here):
    for seed, name in enumerate(("left", "right")):
        command_line.adapter(name, seed).save_pretrained(here / name)
    pool = lw.ExpertPool([lw.Adapter.from_pretrained(here / name) for name in ("left", "right")])
    save_as_peft(lw.router("arrow", pool, top_k=1, direction="power_iteration", seed=5), "of_peft", pool)
    lw.Hub("hub").close()
    done = command_line.call("hub", "add", "of_peft", "--hub", "hub", "--json")
    assert done.exit_code == 0, done.stderr
    with lw.Hub("hub") as hub:
        (kept,) = json.loads(done.stdout)
        assert (kept["name"], kept["hash"]) == ("of_peft", hub.composition("of_peft").hash)
        assert lw.parse("@of_peft").mixture(hub).top_k == 1
    assert "formulas and the server know it as @of_peft" in " ".join(done.stderr.split())
