"""mtlora and mlore on the shape of SegFormer-B0 learn two dense tasks better than a head on the frozen encoder alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import loraweave as lw

pytestmark = pytest.mark.slow
STEPS, RATE, SIDE = 60, 3e-3, 32
RECIPES = {
    "mtlora": {},
    "mlore": {"ranks": (4, 8, 12, 16), "top_k": 2, "rank": 8, "target_modules": ("proj", "linear_fuse")},
}


def scenes(count, seed):
    """Images with a square and a disc of other patterns, the nearer the brighter: their classes and depths."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    patterns = {1: (x + y) % 4 < 2, 2: x // 2 % 2 == 0}
    rows = []
    for _ in range(count):
        pixels = 0.3 * torch.randn(3, SIDE, SIDE, generator=draw)
        classes, depths = torch.zeros(SIDE, SIDE, dtype=torch.long), torch.ones(SIDE, SIDE)
        for kind, pattern in patterns.items():
            top, left = torch.randint(6, SIDE - 6, (2,), generator=draw).tolist()
            near = float(torch.rand(1, generator=draw))
            inside = (y - top) ** 2 + (x - left) ** 2 < 36
            if kind == 1:
                inside = ((y - top).abs() < 6) & ((x - left).abs() < 6)
            classes[inside], depths[inside] = kind, near
            pixels[:, inside] = 0.3 * pixels[:, inside] + (1.5 - near) * pattern[inside]
        # the model's outputs are a quarter as wide
        rows.append({"pixel_values": pixels, "classes": classes[2::4, 2::4], "depths": depths[2::4, 2::4]})
    return rows


def loss(output, columns):
    is_depth = torch.tensor([task == "depth" for task in columns["task"]])
    classes = functional.cross_entropy(output.logits[:, :3], columns["classes"], reduction="none").mean((1, 2))
    depths = (output.logits[:, 3] - columns["depths"]).square().mean((1, 2))
    return torch.where(is_depth, depths, classes).mean()


def stacked(rows, name):
    return torch.stack([row[name] for row in rows])


@torch.no_grad()
def errors(model, rows, *, tasks):
    """(1 - the mean over classes of intersection over union, root of the mean squared error of depths)."""
    asked = {task: {"task": task} if tasks else {} for task in ("segmentation", "depth")}
    made = {task: model(pixel_values=stacked(rows, "pixel_values"), **more).logits for task, more in asked.items()}
    found, classes = made["segmentation"][:, :3].argmax(dim=1), stacked(rows, "classes")
    shares = [((found == k) & (classes == k)).sum() / ((found == k) | (classes == k)).sum() for k in range(3)]
    depth = (made["depth"][:, 3] - stacked(rows, "depths")).square().mean().sqrt()
    return 1 - float(torch.stack(shares).mean()), float(depth)


def base():
    torch.manual_seed(0)
    still = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=4, **still)).eval()


@pytest.fixture(scope="module")
def data():
    return scenes(64, 1), scenes(32, 2)


@pytest.fixture(scope="module")
def of_head(data):
    """The errors with the head alone trained, as many steps on as many rows."""
    rows, held = data
    model = base().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.decode_head.requires_grad_(True).parameters(), lr=RATE, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        own = [rows[place] for place in torch.randint(len(rows), (8,), generator=draw).tolist()]
        columns = {name: stacked(own, name) for name in own[0]} | {"task": ["segmentation", "depth"] * 4}
        optimizer.zero_grad()
        loss(model(pixel_values=columns["pixel_values"]), columns).backward()
        optimizer.step()
    return errors(model, held, tasks=False)


@pytest.mark.parametrize("name", RECIPES)
def test_it_beats_the_head_alone_on_both_tasks(name, data, of_head):
    rows, held = data
    model = base()
    with lw.experts(name, model, tasks=("segmentation", "depth"), **RECIPES[name]) as made:
        model.decode_head.requires_grad_(True)
        tasks = {"segmentation": rows, "depth": rows}
        made.fit(tasks, loss=loss, steps=STEPS, batch_size=8, lr=RATE, progress=False)
        segmentation, depth = errors(made, held, tasks=True)
        assert segmentation < 0.9 * of_head[0]
        assert depth < 0.95 * of_head[1]
