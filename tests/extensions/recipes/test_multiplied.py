"""A weight times another of low rank, elementwise, against the dense product, row by row."""

import pytest
import torch

import loraweave as lw
from loraweave.composer.experts.parts import make_recipe
from loraweave.errors import ScopeError
from loraweave.extensions.recipes.forms.multiplied import Multiplied
from loraweave.routers.recipes._recipe import ExpertShape, Site

IDS = torch.tensor([[3, 9, 27, 20, 60], [5, 25, 3, 15, 44], [11, 7, 44, 19, 8]])
TASKS = ("sums", "colours", "names")
LAYERS = {"llama": "v_proj", "gpt2": "c_attn", "bert": "query"}


@pytest.fixture
def make_trained(make_model, trained):
    def make(kind, *, rank):
        model = make_model(kind, dtype=torch.float64)
        return trained(lw.experts("flora", model, tasks=TASKS, rank=rank, target_modules=(LAYERS[kind],)))

    return make


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, 3])
def test_each_row_has_the_weight_of_its_task(make_trained, kind, rank):
    made = make_trained(kind, rank=rank)
    name = next(reversed(made.sites))
    module, experts = made.base_model.get_submodule(name), made.layers[name.replace(".", "/")]
    seen = {}
    # before and after the expert model's own hooks
    module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]), prepend=True)
    module.register_forward_hook(lambda _, args, y: seen.update(y=y))
    made(input_ids=IDS, task=["names", "sums", "names"])
    weight_OI = module.weight.T if kind == "gpt2" else module.weight
    for row, expert in enumerate((2, 0, 2)):
        dense_OI = weight_OI * (experts.b_ERO[expert].T @ experts.a_ERI[expert])
        expected_TO = seen["x"][row] @ dense_OI.T + (0 if module.bias is None else module.bias)
        torch.testing.assert_close(seen["y"][row], expected_TO)


def test_a_batch_equals_its_rows_alone_in_value_and_gradient(make_trained):
    made = make_trained("llama", rank=2)
    learned = list(made.expert_parameters().values())
    tasks = ["names", "sums", "names"]
    together = made(input_ids=IDS, task=tasks).logits
    alone = torch.cat([made(input_ids=IDS[row : row + 1], task=tasks[row]).logits for row in range(3)])
    torch.testing.assert_close(together, alone)
    gradients = [torch.autograd.grad(logits.logsumexp(dim=-1).sum(), learned) for logits in (together, alone)]
    torch.testing.assert_close(*gradients)
    # no row is of the second task
    assert not gradients[0][0][1].any()


def test_one_rank_is_the_published_product(make_trained):
    made = make_trained("llama", rank=1)
    site = Site("layer", 5, 4)
    form = Multiplied(made.recipe, site, ExpertShape((1, 1)))
    torch.nn.init.normal_(form.a_ERI)
    torch.nn.init.normal_(form.b_ERO)
    layer, x_BTI = torch.nn.Linear(5, 4, bias=False), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    seen = {}
    args = form.before(0, layer, (x_BTI,), lambda _: torch.eye(2)[:, None], seen)
    y_BTO = form.after(0, layer, args, layer(*args), seen)
    for row in range(2):
        expected_TO = form.b_ERO[row] * layer(form.a_ERI[row] * x_BTI[row])
        torch.testing.assert_close(y_BTO[row], expected_TO)


def test_weights_that_vary_within_a_row_are_refused(make_trained):
    form = Multiplied(make_recipe("flora", {"tasks": TASKS}), Site("layer", 5, 4), ExpertShape((1, 1)))
    with pytest.raises(ScopeError, match="layer 'layer' are of whole rows, but the weights vary from token to token"):
        form.before(0, torch.nn.Linear(5, 4), (torch.ones(2, 3, 5),), lambda _: torch.full((2, 3, 2), 0.5), {})
