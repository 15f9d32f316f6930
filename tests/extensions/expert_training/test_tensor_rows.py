"""Training on rows of tensors: images, whole texts with one label, and losses of the caller's own."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

import loraweave as lw
from loraweave.errors import InvalidTask, TrainingError

SETTINGS = {"steps": 3, "batch_size": 4, "warmup": 0, "progress": False}
OPTIONS = {"num_experts": (2, 3), "rank": 2, "target_modules": ("q_proj", "v_proj", "fc1")}


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


def test_the_first_loss_is_the_mean_over_the_images_of_the_step(made, images):
    with torch.no_grad():
        logits = made.base_model(pixel_values=stacked(images)).logits
    expected = -functional.log_softmax(logits, dim=1)[range(8), [i % 3 for i in range(8)]].mean()
    made.fit(images, **{**SETTINGS, "batch_size": 8}, evaluation=images)
    report = made.training_report
    assert report.losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert report.evaluations[0] == (0, pytest.approx(float(expected), rel=1e-5))
    assert report.tokens == 3 * 8


def test_passes_of_a_step_add_up_to_its_gradient(images):
    found = []
    for passes in (None, 4):
        made = lw.experts("mola", _vit().double(), **OPTIONS, balance=0.0)
        found.append(made.fit(images, **{**SETTINGS, "batch_size": 8}, clip=None, gradient_accumulation=passes))
    assert found[1].training_report.losses == pytest.approx(found[0].training_report.losses, rel=1e-9)
    for name, value in found[0].expert_state().items():
        torch.testing.assert_close(found[1].expert_state()[name], value, rtol=1e-6, atol=1e-9)


def test_what_is_learned_tells_the_images_apart(made, images):
    made.fit(images, **{**SETTINGS, "steps": 60, "lr": 0.02})
    assert made(pixel_values=stacked(images)).logits.argmax(dim=1).tolist() == [row["labels"] for row in images]
    assert not made.training_report.dead


def test_rows_are_read_when_a_step_has_them_from_arrays_of_any_precision(images):
    class Folder:
        asked = 0

        def __len__(self):
            return len(images)

        def __getitem__(self, place):
            Folder.asked += 1
            row = images[place]
            return {"pixel_values": row["pixel_values"].numpy().astype(np.float64), "labels": np.int64(row["labels"])}

    ours, expected = (lw.experts("mola", _vit(), **OPTIONS) for _ in range(2))
    ours.fit(Folder(), **SETTINGS)
    expected.fit(iter(images), **SETTINGS)
    assert Folder.asked == len(images) + 3 * 4
    assert ours.training_report.losses == expected.training_report.losses


def test_an_interrupted_training_goes_on_to_the_same_bits(images, tmp_path):
    class Stop(Exception):
        pass

    calls = []

    def loss(output, columns):
        calls.append(1)
        if len(calls) == 5:
            raise Stop
        return functional.cross_entropy(output.logits, columns["classes"])

    rows = [{"pixel_values": row["pixel_values"], "classes": row["labels"]} for row in images]
    settings = {**SETTINGS, "steps": 6, "loss": loss}

    def model():
        base = _vit()
        made = lw.experts("mola", base, **OPTIONS)
        base.classifier.requires_grad_(True)
        return made

    with pytest.raises(Stop):
        model().fit(rows, **settings, checkpoint=tmp_path, checkpoint_every=2)
    resumed = model().fit(rows, **settings, checkpoint=tmp_path, checkpoint_every=2)
    assert len(calls) == 5 + 2
    expected = model().fit(rows, **settings)
    for name, value in expected.learning().items():
        assert torch.equal(resumed.learning()[name], value), name


def smoothed(share):
    """A loss that is the same function for the same share."""

    def loss(output, columns):
        return functional.cross_entropy(output.logits, columns["classes"], label_smoothing=share)

    return loss


def weighted(numbers):
    weight = torch.tensor(numbers)
    return lambda output, columns: functional.cross_entropy(output.logits, columns["classes"], weight=weight)


class Summed:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, output, columns):
        return self.scale * functional.cross_entropy(output.logits, columns["classes"])


def scaled(output, columns, scale):
    return scale * functional.cross_entropy(output.logits, columns["classes"])


@pytest.mark.parametrize(
    ("make", "own", "other"),
    [
        (smoothed, 0.0, 0.5),
        (weighted, [1.0, 1.0, 1.0], [1.0, 9.0, 1.0]),
        (Summed, 1.0, 3.0),
        (lambda scale: partial(scaled, scale=scale), 1.0, 3.0),
        (lambda half: smoothed(0.5) if half else weighted([1.0, 2.0, 3.0]), True, False),
        (lambda again: lambda output, columns: scaled(output, columns, 3.0 if again else 1.0), True, False),
    ],
)
def test_a_training_goes_on_with_its_own_loss_alone(images, tmp_path, make, own, other):
    rows = [{"pixel_values": row["pixel_values"], "classes": row["labels"]} for row in images]

    def steps(loss):
        """How many passes a training takes that finds what is in the folder."""
        counted = []

        class Counted(TrainerCallback):
            def on_step_end(self, *_, **__):
                counted.append(1)

        made = lw.experts("mola", _vit(), **OPTIONS)
        made.fit(rows, **SETTINGS, loss=loss, checkpoint=tmp_path, checkpoint_every=3, callbacks=[Counted()])
        return len(counted), made

    assert steps(make(own))[0] == 3
    assert steps(make(own))[0] == 0
    num_steps, made = steps(make(other))
    assert num_steps == 3
    expected = lw.experts("mola", _vit(), **OPTIONS).fit(rows, **SETTINGS, loss=make(other))
    assert made.training_report.losses == expected.training_report.losses


def test_a_classifier_of_texts_learns_from_one_label_a_text():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**sizes, **dropout, max_position_embeddings=8, num_labels=2)).eval()
    texts = [{"input_ids": [1, 5 + i, 0], "attention_mask": [1, 1, 0], "labels": i % 2} for i in range(4)]
    made = lw.experts("mola", base, num_experts=(2,), rank=2, target_modules=("query", "value"))
    logits = [base(input_ids=torch.tensor([[1, 5 + i]])).logits[0] for i in range(4)]
    expected = torch.stack([-functional.log_softmax(logits[i], dim=0)[i % 2] for i in range(4)]).mean()
    made.fit(texts, **{**SETTINGS, "lr": 0.02})
    assert made.training_report.losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_an_image_beside_tokens_is_learned_from_by_target_tokens():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    settings = {"image_token_index": 19, "vision_feature_layer": -1, "text_config": LlamaConfig(**sizes, vocab_size=20)}
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, **settings)).eval()
    ids = [1, 19, 19, 19, 19, 5, 6, 7]
    rows = [
        {"input_ids": ids, "labels": [-100] * (7 - i % 2) + ids[7 - i % 2 :], "pixel_values": torch.rand(3, 8, 8)}
        for i in range(4)
    ]
    losses = []
    for row in rows:
        logits = base(input_ids=torch.tensor([ids]), pixel_values=row["pixel_values"][None]).logits[0]
        targets = [place for place, label in enumerate(row["labels"]) if label != -100]
        losses += [-functional.log_softmax(logits[place - 1], dim=0)[ids[place]] for place in targets]
    assert len(losses) == 6
    made = lw.experts("mixtral", base, rank=2, num_experts=3, top_k=1, target_modules=("q_proj", "v_proj"))
    assert any("vision_tower" in site for site in made.sites)
    made.fit(rows, **SETTINGS, gradient_accumulation=2)
    assert made.training_report.losses[0] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def changed(place, **columns):
    return lambda images: [{**row, **columns} if at == place else row for at, row in enumerate(images)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: [], "dataset is empty: rows are {name: tensor"),
        (lambda _: "images", "dataset is 'images', not rows"),
        (lambda _: [(1, 2)], "row 1 of dataset is tuple, not a mapping"),
        (lambda _: [{"labels": 1}], "row 1 of dataset has no 'pixel_values', but 'labels'"),
        (lambda _: [{"pixel_values": torch.rand(3, 8, 8)}], "row 1 of dataset has no 'labels', but 'pixel_values'"),
        (lambda _: {"cats": []}, r"dataset\['cats'\] is empty"),
        (torch.utils.data.DataLoader, "is a DataLoader, whose batches are not rows: give its dataset"),
        (changed(0, label=1), "row 1 of dataset has 'label', which ViTFor.* does not take; it takes pix"),
        (changed(1, head_mask=1), "row 2 of dataset has 'head_mask', which ViTFor.* does not take"),
        (changed(2, labels="cat"), "row 3 of dataset has 'cat' as 'labels', which cannot become a tensor"),
        (changed(1, labels=0.5), "'labels' of row 2 of dataset is of torch.float32, but of torch.int64"),
        (changed(1, pixel_values=torch.zeros(3, 8, 8, dtype=torch.uint8)), "of torch.uint8: let the"),
        (changed(0, pixel_values=torch.rand(1, 3, 8, 8)), r"\(1, 3, 8, 8\), a batch of one"),
        (
            changed(3, pixel_values=torch.rand(3, 4, 8)),
            r"'pixel_values' of row 4 of dataset has shape \(3, 4, 8\), but \(3, 8, 8\) in row 1 of dataset: rows are",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_name(made, images, change, said):
    with pytest.raises(InvalidTask, match=said):
        made.fit(change(images), **SETTINGS)


def test_a_column_that_one_row_alone_has_is_refused(made, images):
    with pytest.raises(InvalidTask, match="'weight' is in only one of row 1 of dataset and row 3 of dataset: all rows must"):
        made.fit(changed(2, weight=1.0)(images), **SETTINGS, loss=lambda output, columns: output.logits.mean())


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda output, columns: output.logits, r"loss\(\) gave a tensor of shape \(4, 3\); it must be one number"),
        (lambda output, columns: 0.5, r"loss\(\) gave 0.5"),
        (lambda output, columns: torch.tensor(0.5), r"loss\(\) gave tensor\(0.5000\)"),
        ("mse", "loss is 'mse'; it must be a function"),
    ],
)
def test_a_loss_that_is_none_is_refused(made, images, loss, said):
    with pytest.raises(TrainingError, match=said):
        made.fit(images, **SETTINGS, loss=loss)
