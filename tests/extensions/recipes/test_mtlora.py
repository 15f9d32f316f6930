"""A shared stream through all blocks, and a branch for each task in the last block of each stage."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import loraweave as lw
from loraweave.errors import ScopeError, UnknownName, WeightingError

TASKS = ("segmentation", "depth", "edges")
OPTIONS = {"tasks": TASKS, "rank": 3, "task_rank": (1, 2, 4), "shared_scale": 0.75, "task_scale": (0.5, 1.5, 2.0)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.q_proj, self.o_proj = nn.Linear(6, 5), nn.Linear(5, 6)
        self.fc1, self.fc2 = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        x = x + self.o_proj(self.q_proj(self.norm1(x)))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Stages(nn.Module):
    """Two stages of two blocks and one; the output has the features of both."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Module(), nn.Module()])
        for stage, depth in zip(self.stages, (2, 1), strict=True):
            stage.blocks = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x):
        features = []
        for stage in self.stages:
            for block in stage.blocks:
                x = block(x)
            features.append(x)
        return torch.cat(features, dim=-1)


TARGETS = {"target_modules": ("q_proj", "o_proj", "fc1", "fc2"), "dropout": 0.0}


def drawn(made):
    """With values of b, and of LayerNorms, that are not those at the beginning."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in made.expert_parameters().items():
            if not name.endswith("a_SI"):
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return made.double()


@pytest.fixture
def stages():
    torch.manual_seed(0)
    return Stages().double()


@pytest.fixture
def x_BTI():
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def update(made, path, expert, x):
    """scale * B A x of one expert; expert 0 is the shared one where there is one."""
    layer, gate = made.layers[path.replace(".", "/")], made.gates[path.replace(".", "/")]
    ranks = list(layer.shape.ranks)
    rows = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
    return gate.scale_E[expert] * (x @ layer.a_SI[rows].T @ layer.b_SO[rows])


def streams(made, stage, number, name, x, xs_t):
    """(shared stream's, each branch's) output of a place of the last block of a stage, as the paper's code has it."""
    path = f"stages.{stage}.blocks.{number}.{name}"
    module, mode = made.base_model.get_submodule(path), made.recipe.mode
    y0 = functional.linear(x, module.weight, module.bias)
    if mode == "addition":
        norm = made.layers[path.replace(".", "/")].norm
        ys_t = [y0 + update(made, path, task, x_t) for task, x_t in enumerate(xs_t)]
        return y0 + functional.layer_norm(sum(ys_t), y0.shape[-1:], norm.weight, norm.bias), ys_t
    shared = y0 + update(made, path, 0, x)
    ys_t = [(shared if mode == "matrixv2" else y0) + update(made, path, 1 + task, x_t) for task, x_t in enumerate(xs_t)]
    return shared, ys_t


def published(made, x, task):
    """One row's features, with the streams of all tasks written out."""
    features = []
    for stage, depth in enumerate((2, 1)):
        for number in range(depth):
            block = made.base_model.stages[stage].blocks[number]
            path = f"stages.{stage}.blocks.{number}"

            def shared_of(name, x, block=block, path=path):
                return getattr(block, name)(x) + update(made, f"{path}.{name}", 0, x)

            inner = shared_of("q_proj", block.norm1(x))
            if number < depth - 1:
                x = x + shared_of("o_proj", inner)
                x = x + shared_of("fc2", functional.gelu(shared_of("fc1", block.norm2(x))))
                continue
            out, outs = streams(made, stage, number, "o_proj", inner, [inner] * len(TASKS))
            xs_t, x = [x + out_t for out_t in outs], x + out
            out, outs = streams(made, stage, number, "fc1", block.norm2(x), [block.norm2(x_t) for x_t in xs_t])
            out, outs = streams(made, stage, number, "fc2", functional.gelu(out), [functional.gelu(out_t) for out_t in outs])
            xs_t, x = [x_t + out_t for x_t, out_t in zip(xs_t, outs, strict=True)], x + out
        features.append(xs_t[task])
    return torch.cat(features, dim=-1)


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_a_row_has_the_branch_of_its_task_and_the_next_stage_the_shared_stream(stages, x_BTI, mode):
    with drawn(lw.experts("mtlora", stages, mode=mode, **OPTIONS, **TARGETS)) as made:
        together = made(x_BTI, task=["depth", "edges", "segmentation", "depth"])
        for x_TI, y_TO, task in zip(x_BTI, together, (1, 2, 0, 1), strict=True):
            torch.testing.assert_close(y_TO, published(made, x_TI, task), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_gradients_are_those_of_the_streams_written_out(stages, x_BTI, mode):
    with drawn(lw.experts("mtlora", stages, mode=mode, trainable_scales=True, **OPTIONS, **TARGETS)) as made:
        parameters = made.expert_parameters()
        own = torch.autograd.grad(made(x_BTI[:1], task="depth").square().sum(), list(parameters.values()), allow_unused=True)
        written = torch.autograd.grad(
            published(made, x_BTI[0], 1).square().sum(), list(parameters.values()), allow_unused=True
        )
        for name, ours, theirs in zip(parameters, own, written, strict=True):
            zero = torch.zeros_like(parameters[name])
            torch.testing.assert_close(
                zero if ours is None else ours, zero if theirs is None else theirs, rtol=1e-8, atol=1e-9, msg=name
            )


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_without_a_task_update_a_branch_has_the_bases_output_or_with_matrixv2_the_shared_streams(stages, x_BTI, mode):
    place = {"target_modules": ("stages.1.blocks.0.fc2",), "task_modules": ("fc2",), "dropout": 0.0}
    expected, inner = stages(x_BTI), {}
    stages.stages[1].blocks[0].fc2.register_forward_pre_hook(lambda _, args: inner.update(x=args[0]))
    with drawn(lw.experts("mtlora", stages, mode=mode, **OPTIONS, **place)) as made:
        layer = made.layers["stages/1/blocks/0/fc2"]
        with torch.no_grad():
            layer.b_SO[3:] = 0
        found = made(x_BTI, task="depth")
    if mode == "matrixv2":
        expected[..., 6:] += 0.75 * (inner["x"] @ layer.a_SI[:3].T @ layer.b_SO[:3])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_tasks_have_experts_in_closing_blocks_at_task_modules_alone_with_ranks_of_their_own(stages):
    with lw.experts("mtlora", stages, **OPTIONS, **TARGETS) as made:
        ranks = {name.replace("/", "."): layer.shape.ranks for name, layer in made.layers.items()}
    assert {name for name, found in ranks.items() if len(found) > 1} == {
        f"stages.{block}.{name}" for block in ("0.blocks.1", "1.blocks.0") for name in ("o_proj", "fc1", "fc2")
    }
    assert ranks["stages.1.blocks.0.fc1"] == (3, 1, 2, 4)
    assert ranks["stages.1.blocks.0.q_proj"] == (3,)


def test_addition_begins_as_the_base_and_as_released_it_does_not(stages, x_BTI):
    base = stages(x_BTI)
    for as_released in (False, True):
        with lw.experts("mtlora", stages, mode="addition", as_released=as_released, **OPTIONS, **TARGETS) as made:
            assert torch.allclose(made.double()(x_BTI, task="depth"), base, rtol=1e-9) is not as_released


@pytest.mark.parametrize("kind", ["segformer", "upernet"])
@pytest.mark.parametrize("mode", ["matrix", "addition"])
def test_a_batch_of_tasks_is_each_row_with_its_own(make_model, kind, mode):
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with drawn(lw.experts("mtlora", make_model(kind, dtype=torch.float64), mode=mode, **OPTIONS)) as made:
        together = made(pixel_values=pixels, task=[2, 0, 1]).logits
        for number, task in enumerate((2, 0, 1)):
            alone = made(pixel_values=pixels[number : number + 1], task=task).logits
            torch.testing.assert_close(together[number], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_blocks_that_run_again_for_their_gradients_give_the_same(make_model, mode):
    pixels = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with drawn(
        lw.experts("mtlora", make_model("segformer", dtype=torch.float64), mode=mode, dropout=0.3, **OPTIONS)
    ) as made:
        made.train()
        found = []
        for again in (False, True):
            if again:
                made.gradient_checkpointing_enable()
            torch.manual_seed(4)
            made.zero_grad()
            made(pixel_values=pixels, task=[2, 0]).logits.square().mean().backward()
            found.append({name: value.grad for name, value in made.expert_parameters().items() if value.grad is not None})
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_statistics_of_batches_stay_the_bases_while_it_trains(make_model):
    model = make_model("upernet")
    before = {name: value.clone() for name, value in model.named_buffers()}
    with lw.experts("mtlora", model, **OPTIONS) as made:
        made.train()(pixel_values=torch.randn(2, 3, 16, 16), task=[0, 1])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_addition_outside_the_blocks_is_refused(make_model):
    options = {**OPTIONS, "target_modules": ("classifier",), "task_modules": ("classifier",)}
    with pytest.raises(WeightingError, match=r"recipe 'mtlora' got mode='addition'; 'decode_head\.classifier' is outside"):
        lw.experts("mtlora", make_model("segformer"), mode="addition", **options)


def test_a_row_needs_a_task_that_is_known(stages, x_BTI):
    with lw.experts("mtlora", stages.float(), **OPTIONS, **TARGETS) as made:
        with pytest.raises(ScopeError, match="'mtlora' looks at the task of each row: give task="):
            made(x_BTI.float())
        with pytest.raises(UnknownName, match="no task 'dept', did you mean 'depth'"):
            made(x_BTI.float(), task="dept")


def test_what_two_passes_cannot_do_is_refused(make_model):
    options = {**OPTIONS, "target_modules": ("o_proj",), "task_modules": ("o_proj",)}
    with lw.experts("mtlora", make_model("llama"), **options) as made:
        ids_BT = torch.tensor([[3, 9]])
        with pytest.raises(ScopeError, match="generates no tokens"):
            made.generate(ids_BT, task=0)
        cache = made.base_model(input_ids=ids_BT).past_key_values
        with pytest.raises(ScopeError, match="takes no cache"):
            made(input_ids=ids_BT, past_key_values=cache, task=0)


def test_a_layer_that_runs_twice_is_refused(x_BTI):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc1(self.fc1(x))

    made = lw.experts("mtlora", Twice(), **{**OPTIONS, "target_modules": ("fc1",)})
    with made, pytest.raises(ScopeError, match="'fc1' runs more than once in a call"):
        made(x_BTI.float(), task=0)
