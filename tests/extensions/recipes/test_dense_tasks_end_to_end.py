"""Two dense tasks learned together on one frozen vision model: which colour a pixel has, and how bright it is."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw

TASKS = ("segmentation", "depth")
SETTINGS = {
    "mtlora": ("upernet", {"rank": 4, "task_rank": 4, "dropout": 0.0}),
    "mlore": ("upernet", {"ranks": (2, 4, 6), "top_k": 2, "rank": 4}),
}


def images(num_rows, *, seed):
    """Squares of one colour on a dark ground, with the class of each pixel (0 is the ground) and its brightness."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.1 * torch.rand(num_rows, 3, 16, 16, generator=generator)
    classes = torch.zeros(num_rows, 16, 16, dtype=torch.long)
    for row in range(num_rows):
        colour, top, left = (int(torch.randint(high, (), generator=generator)) for high in (2, 8, 8))
        pixels[row, colour, top : top + 8, left : left + 8] += 1
        classes[row, top : top + 8, left : left + 8] = 1 + colour
    return pixels, classes, pixels.mean(dim=1)


def losses(made, pixels, classes, depths):
    """Of each task, for rows of both in one batch: the first channels of the output are classes, the last one is depth."""
    half = len(pixels) // 2
    logits = made(pixel_values=pixels, task=[TASKS[0]] * half + [TASKS[1]] * half).logits
    logits = functional.interpolate(logits, size=(16, 16))
    segmentation = functional.cross_entropy(logits[:half, :3], classes[:half])
    return segmentation, functional.mse_loss(logits[half:, 3], depths[half:])


@pytest.mark.parametrize("name", SETTINGS)
def test_both_tasks_are_learned_at_once(make_model, name):
    kind, options = SETTINGS[name]
    model = make_model(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    unseen = images(8, seed=1)
    torch.manual_seed(0)
    with lw.experts(name, model, tasks=TASKS, **options) as made:
        with torch.no_grad():
            first = losses(made, *unseen)
        optimizer = torch.optim.Adam(made.expert_parameters().values(), lr=1e-2)
        made.train()
        for step in range(20):
            loss = sum(losses(made, *images(8, seed=2 + step))) + sum(made.terms.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        made.eval()
        with torch.no_grad():
            last = losses(made, *unseen)
        assert all(after < 0.5 * at_first for after, at_first in zip(last, first, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
