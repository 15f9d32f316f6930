"""Convolutions of low rank, mixed for each task and image, beside one that all share and one of each task's own."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.errors import ScopeError
from loraweave.routers.recipes._gate import Call

TASKS = ("segmentation", "depth")
PLACE = "decode_head.fpn_convs.0.conv"
OPTIONS = {"tasks": TASKS, "ranks": (1, 4, 2, 3), "top_k": 2, "rank": 2, "target_modules": (PLACE,)}


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def model(make_model):
    return make_model("upernet", dtype=torch.float64)


def trained(model, **options):
    made = lw.experts("mlore", model, **{**OPTIONS, **options})
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in made.layers.values():
            layer.b_SO.normal_()
    return made


def seen_at(made, pixels, task):
    """(input, output, w_BE) of the place in a call."""
    seen = {}
    module = made.base_model.get_submodule(PLACE)
    hook = module.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    gate = made.gates[PLACE.replace(".", "/")]
    weighed = gate.register_forward_hook(lambda _, args, out: seen.update(w=out.w_BTE[:, 0]))
    made(pixel_values=pixels, task=task)
    hook.remove()
    weighed.remove()
    return seen["x"], seen["y"], seen["w"]


def test_a_place_adds_its_branches(model, pixels):
    with trained(model) as made:
        x, y, w_BE = seen_at(made, pixels, ["depth", "segmentation", "depth"])
        layer, module = made.layers[PLACE.replace(".", "/")], model.get_submodule(PLACE)
        assert layer.shape.ranks == (1, 4, 2, 3, 8, 2, 2)
        expected = functional.conv2d(x, module.weight, module.bias, padding=1)
        start = 0
        for expert, rank in enumerate(layer.shape.ranks):
            # a convolution to the rank, then one of a pixel
            a = layer.a_SI[start : start + rank].view(rank, 8, 3, 3)
            b = layer.b_SO[start : start + rank].T.reshape(8, rank, 1, 1)
            expected = expected + w_BE[:, expert, None, None, None] * functional.conv2d(
                functional.conv2d(x, a, padding=1), b
            )
            start += rank
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(w_BE[:, 4], torch.ones(3, dtype=torch.float64))
        assert torch.equal(w_BE[:, 5:] != 0, torch.tensor([[False, True], [True, False], [False, True]]))


def test_each_images_branches_are_one_convolution(model, pixels):
    with trained(model) as made:
        x, y, w_BE = seen_at(made, pixels, [1, 0, 1])
        module = model.get_submodule(PLACE)
        for x_CHW, y_CHW, w_E in zip(x, y, w_BE, strict=True):
            factors = made.layers[PLACE.replace(".", "/")].factors(w_E)
            weight = module.weight + (factors.b_OR @ factors.a_RI).view_as(module.weight)
            torch.testing.assert_close(
                functional.conv2d(x_CHW[None], weight, module.bias, padding=1)[0], y_CHW, rtol=1e-4, atol=1e-4
            )


def test_a_linear_layer_that_sees_whole_images_has_the_same_formula(make_model, pixels):
    model, place = make_model("segformer", dtype=torch.float64), "decode_head.linear_projections.1.proj"
    with trained(model, target_modules=(place,), generic=False) as made:
        layer, gate, seen = made.layers[place.replace(".", "/")], made.gates[place.replace(".", "/")], {}
        model.get_submodule(place).register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
        gate.register_forward_hook(lambda _, args, out: seen.update(w=out.w_BTE[:, 0]))
        made(pixel_values=pixels, task=[0, 1, 0])
        w_BS = seen["w"].repeat_interleave(torch.tensor(layer.shape.ranks), dim=1)
        module = model.get_submodule(place)
        weights_BOI = module.weight + torch.einsum("bs,so,si->boi", w_BS, layer.b_SO, layer.a_SI)
        expected = torch.einsum("bti,boi->bto", seen["x"], weights_BOI) + module.bias
        torch.testing.assert_close(seen["y"], expected, rtol=1e-10, atol=1e-10)


def test_an_expert_is_an_adapter_that_a_composer_mixes(model, pixels):
    with trained(model) as made:
        adapter = made.expert(1)
        assert {name: factors.kernel for name, factors in adapter.layers.items()} == {PLACE: (3, 3)}
        layer, module = made.layers[PLACE.replace(".", "/")], model.get_submodule(PLACE)
        update = (layer.b_SO[1:5].T @ layer.a_SI[1:5]).view(8, 8, 3, 3).detach()
    with lw.Composer(model, [adapter]).activate({adapter.name: 1.0}):
        live = model(pixel_values=pixels).logits
    with torch.no_grad():
        module.weight += update
    torch.testing.assert_close(live, model(pixel_values=pixels).logits, rtol=1e-5, atol=1e-5)


def test_the_generic_path_can_be_any_update_of_the_weight(model):
    with trained(model, ranks=(1,), top_k=1) as made:
        layer = made.layers[PLACE.replace(".", "/")]
        w_E = torch.tensor([0.0, 1.0, 0.0, 0.0])
        factors = layer.factors(w_E)
        assert torch.linalg.matrix_rank(factors.b_OR @ factors.a_RI) == min(8, 72)
    with trained(model, generic=False) as made:
        assert made.layers[PLACE.replace(".", "/")].shape.ranks == (1, 4, 2, 3, 2, 2)


def test_as_released_it_does_not_begin_as_the_base(model, pixels):
    base = model(pixel_values=pixels).logits
    for as_released in (False, True):
        with lw.experts("mlore", model, as_released=as_released, **OPTIONS) as made:
            found = made(pixel_values=pixels, task="depth").logits
            assert torch.allclose(found, base, rtol=1e-9) is not as_released
            b_SO = made.layers[PLACE.replace(".", "/")].b_SO
            # kaiming_uniform of a 1 x 1 convolution from 4 channels
            assert b_SO[1:5].abs().max() <= 4**-0.5


def released(made, base, x, task, *, statistics=None):
    """MOEBlock of one task, from single convolutions; with `statistics`, {norm: (mean, variance)}, as in evaluation."""
    place = PLACE.replace(".", "/")
    layer, gate, conv = made.layers[place], made.gates[place], functional.conv2d

    def pixelwise(part, x):
        return conv(x, part.weight_KOI[task][..., None, None], part.bias_KO[task])

    def norm(name, x):
        part, known = layer.block[name], statistics and statistics[name]
        mean, variance = known or (x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False))
        unit = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return unit * part.weight_KO[task][:, None, None] + part.bias_KO[task][:, None, None]

    def expert(number, x):
        first, last = sum(layer.shape.ranks[:number]), sum(layer.shape.ranks[: number + 1])
        hidden = conv(x, layer.a_SI[first:last].view(last - first, 8, 3, 3), layer.c_S[first:last], padding=1)
        return conv(hidden, layer.b_SO[first:last].T[..., None, None], layer.d_EO[number])

    z = pixelwise(layer.block["enter"], x)
    gate.eval()
    with torch.no_grad():
        call = Call(task_B=torch.full((len(x),), task))
        w = gate(z.flatten(2).mT, call).w_BTE[:, 0, :, None, None, None]
    mixed = sum(w[:, number] * expert(number, z) for number in range(4))
    generic = expert(4, z) - layer.d_EO[4][:, None, None] if made.recipe.generic else 0
    shared = conv(z, base.weight, base.bias, padding=1) + generic
    place_of_own = 4 + made.recipe.generic + task
    summed = norm("mixed_norm", mixed) + w[:, place_of_own] * expert(place_of_own, z) + shared
    return pixelwise(layer.block["leave"], functional.gelu(norm("norm", summed)))


def test_as_released_a_place_is_the_authors_block_with_statistics_of_each_task(model, pixels):
    base = model.get_submodule(PLACE)
    with trained(model, as_released=True, positions=64) as made, torch.no_grad():
        layer, gate = made.layers[PLACE.replace(".", "/")], made.gates[PLACE.replace(".", "/")]
        layer.d_EO.normal_()
        # the spread of noise is 0, so that training draws nothing
        for part in (gate.v.weight_KOI, gate.v.bias_KO):
            part[:, 4:8] = 0
        # what the generic expert reads has no bias in the authors' code, which has one dense convolution
        layer.c_S[10:18] = 0
        tasks = torch.tensor([1, 0, 1])
        made.train()
        x, y, _ = seen_at(made, pixels, tasks.tolist())
        for task in (0, 1):
            own = tasks == task
            torch.testing.assert_close(y[own], released(made, base, x[own], task), rtol=1e-6, atol=1e-8)
        made.eval()
        x, y, _ = seen_at(made, pixels, tasks.tolist())
        for task in (0, 1):
            known = {
                name: (layer.block[name].mean_KO[task], layer.block[name].variance_KO[task])
                for name in ("mixed_norm", "norm")
            }
            own = tasks == task
            torch.testing.assert_close(y[own], released(made, base, x[own], task, statistics=known), rtol=1e-6, atol=1e-8)
        assert not torch.equal(layer.block["norm"].mean_KO[0], layer.block["norm"].mean_KO[1])
        with pytest.raises(ScopeError, match="learned weights of 64 positions, and this image has 256"):
            made(pixel_values=torch.cat([torch.cat([pixels] * 2, dim=2)] * 2, dim=3), task=0)


def test_as_released_the_shared_path_gives_its_input_no_gradient(model, pixels):
    with trained(model, as_released=True, ranks=(1,), top_k=1) as made:
        layer = made.layers[PLACE.replace(".", "/")]
        with torch.no_grad():
            for part in (layer.b_SO[:1], layer.b_SO[9:], layer.d_EO):
                part.zero_()
        made(pixel_values=pixels, task=[0, 1, 0]).logits.sum().backward()
        assert float(layer.block["enter"].weight_KOI.grad.abs().max()) == 0
        assert float(layer.b_SO.grad[1:9].abs().max()) > 0


def test_as_released_it_is_trained_resumed_saved_and_is_no_adapter(model, pixels, tmp_path):
    rows = [
        {"pixel_values": pixels[n].clone(), "labels": torch.zeros(16, 16).long(), "task": TASKS[n % 2]} for n in range(3)
    ]
    with lw.experts("mlore", model, as_released=True, seed=2, **OPTIONS) as made:
        made.fit(rows, steps=3, batch_size=2, progress=False)
        assert float(made.layers[PLACE.replace(".", "/")].block["norm"].mean_KO.abs().min()) > 0
        made.save_pretrained(tmp_path / "saved")
        expected = made(pixel_values=pixels, task=[0, 1, 0]).logits
        with pytest.raises(lw.LoraweaveError):
            made.expert(0)
    with lw.experts(tmp_path / "saved", model) as opened:
        assert torch.equal(opened(pixel_values=pixels, task=[0, 1, 0]).logits, expected)
    with lw.experts("mlore", model, as_released=True, seed=2, **OPTIONS) as made:
        made.fit(rows, steps=3, batch_size=2, progress=False)
        assert torch.equal(made(pixel_values=pixels, task=[0, 1, 0]).logits, expected)


def test_as_released_it_takes_convolutions_and_no_dropout(make_model):
    place = "decode_head.linear_projections.1.proj"
    with pytest.raises(lw.LayerMismatch, match="is linear, and the released block is of convolutions"):
        lw.experts("mlore", make_model("segformer"), as_released=True, **{**OPTIONS, "target_modules": (place,)})
    with pytest.raises(lw.WeightingError, match=r"dropout=0\.1; it takes 0 with as_released"):
        lw.experts("mlore", make_model("upernet"), as_released=True, dropout=0.1, **OPTIONS)


def test_balance_is_the_variation_of_the_mean_weights_of_the_mixed_experts(model, pixels):
    with trained(model, balance=0.5) as made:
        made.train()(pixel_values=pixels, task=[0, 1, 1])
        use_E = made.notes.weights[PLACE][:, 0, :4].mean(dim=0)
        expected = 0.5 * (use_E.std() / use_E.mean()) ** 2
        torch.testing.assert_close(made.terms["balance"], expected, rtol=1e-6, atol=1e-9)
        made.eval()(pixel_values=pixels, task=0)
        assert not made.terms


def test_layers_that_see_windows_are_refused(model, pixels):
    with trained(model, target_modules=("q_proj",)) as made, pytest.raises(ScopeError, match="looks at whole images, 3 in"):
        made(pixel_values=pixels, task=[0, 1, 1])
