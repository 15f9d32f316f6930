"""Training on rows of tensors: images, whole texts with one label, and losses of the caller's own."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw

SETTINGS = {"steps": 3, "batch_size": 4, "warmup": 0, "progress": False}


OPTIONS = {"num_experts": (2, 3), "rank": 2, "target_modules": ("q_proj", "v_proj", "fc1")}


TASKS = ("segmentation", "depth")


def _vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)).eval()


@pytest.fixture
def images():
    """Eight of three classes, each with a colour of its own."""
    torch.manual_seed(1)
    colours = torch.eye(3)[:, :, None, None]
    return [{"pixel_values": torch.rand(3, 8, 8) + colours[i % 3], "labels": i % 3} for i in range(8)]


@pytest.fixture
def made():
    return lw.experts("mola", _vit(), **OPTIONS, balance=0.0)


def stacked(rows, name="pixel_values"):
    return torch.stack([torch.as_tensor(row[name]) for row in rows])


@pytest.fixture
def scenes():
    """Four images, each once for each of two tasks, with classes and a depth for each pixel."""
    torch.manual_seed(2)
    found = []
    for _ in range(4):
        image = {"pixel_values": torch.rand(3, 16, 16), "classes": torch.randint(3, (8, 8)), "depths": torch.rand(8, 8)}
        found += [{**image, "task": task} for task in TASKS]
    return found


def of_scenes(output, columns):
    """The mean over rows of what each one's task asks for."""
    losses = []
    for logits, classes, depths, task in zip(
        output.logits, columns["classes"], columns["depths"], columns["task"], strict=True
    ):
        segmentation = functional.cross_entropy(logits[None, :3], classes[None])
        losses.append(segmentation if task == "segmentation" else functional.mse_loss(logits[3], depths))
    return torch.stack(losses).mean()


def test_each_task_of_an_image_has_a_loss_of_its_own_and_an_unfrozen_head_learns(make_model, scenes, tmp_path):
    base = make_model("segformer")
    made = lw.experts("mtlora", base, tasks=TASKS, rank=4, task_rank=2)
    base.decode_head.classifier.requires_grad_(True)
    head, encoder = base.decode_head.classifier.weight.clone(), base.segformer.state_dict()
    encoder = {name: value.clone() for name, value in encoder.items()}
    made.fit(scenes, **{**SETTINGS, "steps": 30, "batch_size": 8, "lr": 0.01}, loss=of_scenes)
    report = made.training_report
    assert report.losses[-1] < 0.9 * report.losses[0]
    assert not torch.equal(base.decode_head.classifier.weight, head)
    assert all(torch.equal(value, encoder[name]) for name, value in base.segformer.state_dict().items())
    with torch.no_grad():
        made.train()
        output = made(pixel_values=stacked(scenes), task=[row["task"] for row in scenes])
        made.eval()
    columns = {"classes": stacked(scenes, "classes"), "depths": stacked(scenes, "depths")}
    last = float(of_scenes(output, {**columns, "task": [row["task"] for row in scenes]}))
    # a step further than the last that the report has
    assert last == pytest.approx(report.losses[-1], rel=0.05)
    with pytest.warns(UserWarning, match=r"'decode_head.classifier.weight' and .* 2 in all, may have learned"):
        made.save_pretrained(tmp_path / "saved")


def test_names_of_the_dataset_are_the_tasks_of_its_rows(make_model, scenes):
    images = [{name: row[name] for name in ("pixel_values", "classes", "depths")} for row in scenes[::2]]
    seen = []

    def loss(output, columns):
        seen.extend(columns["task"])
        return of_scenes(output, columns)

    made = lw.experts("mtlora", make_model("segformer"), tasks=TASKS, rank=4, task_rank=2)
    made.fit(dict.fromkeys(TASKS, images), **{**SETTINGS, "steps": 2}, loss=loss)
    assert sorted(seen) == ["depth"] * 4 + ["segmentation"] * 4
