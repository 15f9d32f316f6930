"""Documents as adapters: what they learn, where it is stored, and that it lies beside the task's part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.model import scoring
from loraweave.composer.train.jobs import LoraSettings, SharedPass, job_losses, lora_job
from loraweave.errors import AdapterUnsupported, InvalidName, InvalidTask, TrainingError, UnknownName
from loraweave.extensions.continual import Beside
from loraweave.extensions.continual import documents as memory
from loraweave.extensions.continual.documents import QUESTIONS, remember, split

DOCUMENTS = {"first": "a b c d e f. b c!", "second": "e d c\nf a b"}
ASKED = {"first": [("a b", "c"), ("b c", "d"), ("c d", "e")]}
TRAINED = {"rank": 3, "steps": 6, "lr": 2e-2, "seed": 3, "progress": False, "batch_size": 4}
LAYERS = {"model.layers.0.mlp.gate_proj": (24, 16), "model.layers.1.self_attn.q_proj": (16, 16)}


@pytest.fixture
def model(tiny_llama):
    return tiny_llama


@pytest.fixture
def hub(tmp_path):
    with lw.Hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def answering(model, make_adapter):
    """What answers questions, of rank 5; it also updates layers that documents do not."""
    return make_adapter(model, "answering", rank=5, seed=4)


def test_documents_end_their_sentences_and_answer_half_of_their_questions_unseen(model, tokenizer, hub):
    records = remember(model, tokenizer, hub, DOCUMENTS, questions=ASKED, target_modules=["gate_proj"], **TRAINED)
    ends = lw.Task([("a b", "c d e f."), ("a b c d", "e f."), ("b", "c!")], template="{input}")
    shown = lw.Task(ASKED["first"][:2], instruction="a b c d e f. b c!\nAnswer the question.")
    unseen = lw.Task(ASKED["first"][2:], instruction="Answer the question.")
    others = lw.Task([("e", "d c"), ("e d", "c"), ("f", "a b"), ("f a", "b")], template="{input}")
    tasks = {"first": [ends, shown, unseen], "second": [others]}
    expected = lw.train_adapters(model, tokenizer, tasks, target_modules=["gate_proj"], **TRAINED)
    assert [record.hash for record in records] == [adapter.hash for adapter in expected.values()]
    assert [record.name for record in hub.records(tags="memory")] == ["first", "second"]
    assert hub.record("first").examples == ("a b c d e f.", "b c!")


def test_a_rewrite_is_learned_like_the_document(model, tokenizer, hub, monkeypatch):
    asked = []

    def answer(model, tokenizer, task, inputs, **options):
        asked.append((task.instruction, list(inputs)))
        return ["c b a." for _ in inputs]

    monkeypatch.setattr(memory, "predict", answer)
    (record,) = remember(
        model,
        tokenizer,
        hub,
        {"one": "a b c."},
        questions={"one": [("d", "e")]},
        rewrites=2,
        target_modules=["up_proj"],
        **TRAINED,
    )
    assert [inputs for _, inputs in asked] == [["a b c."], ["c b a."]]
    ends = lw.Task([("a", "b c."), ("a b", "c."), ("c", "b a."), ("c b", "a.")], template="{input}")
    shown = [lw.Task([("d", "e")], instruction=f"{text}\nAnswer the question.") for text in ("a b c.", "c b a.", "c b a.")]
    expected = lw.train_adapters(model, tokenizer, {"one": [ends, *shown]}, target_modules=["up_proj"], **TRAINED)
    assert record.hash == expected["one"].hash


def test_a_document_that_changed_is_a_new_version(model, tokenizer, hub):
    remember(model, tokenizer, hub, DOCUMENTS, target_modules=["gate_proj"], **TRAINED)
    (record,) = remember(model, tokenizer, hub, {"first": "f e d."}, target_modules=["gate_proj"], **TRAINED)
    assert (record.version, record.description, len(hub)) == (2, "f e d.", 2)


def test_beside_an_adapter_a_document_reads_none_of_what_it_reads(model, tokenizer, hub, answering):
    options = {"target_modules": ["gate_proj", "q_proj"], **TRAINED}
    remember(model, tokenizer, hub, DOCUMENTS, beside=answering, **options)
    for name in DOCUMENTS:
        found = hub[name]
        shared = set(found.layers) & set(answering.layers)
        assert shared
        for layer in shared:
            own, its = found.layers[layer].a_RI.double(), answering.layers[layer].a_RI.double()
            assert float((own @ its.T).abs().max()) < 1e-6 * float(own.norm() * its.norm())
        for layer in set(found.layers) - shared:
            assert found.layers[layer].rank == 3


def test_what_was_learned_beside_an_adapter_counts_in_the_sum_with_it(model, tokenizer, hub, answering):
    settings = {**TRAINED, "steps": 25, "target_modules": ["gate_proj", "q_proj"]}
    remember(model, tokenizer, hub, DOCUMENTS, beside=answering, **settings)
    ends = [("a b", "c d e f."), ("a b c d", "e f."), ("b", "c!")]
    task = lw.Task(ends, template="{input}")
    pool = {"answering": answering, **{name: hub[name] for name in DOCUMENTS}}
    losses = {}
    for other in ("", "first", "second"):
        with Composer(model, pool).activate({"answering": 1.0, **({other: 1.0} if other else {})}):
            losses[other] = sum(scoring.losses(model, tokenizer, task, ends))
    assert losses["first"] < min(losses[""], losses["second"])


def test_a_step_beside_an_adapter_has_the_gradients_of_the_formula(make_model, make_adapter, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    beside = make_adapter(model, "beside", rank=2, seed=1)
    job = lora_job(model, "job", LAYERS, LoraSettings(rank=3, alpha=6.0), None, Beside(beside))
    with torch.no_grad():
        for number, (_, b_OR) in enumerate(job.factors.values()):
            b_OR.normal_(generator=torch.Generator().manual_seed(number))
    rows = scoring.encode_pairs(model, tokenizer, replace(QUESTIONS, instruction=""), [("a b", "c"), ("d", "e f")])
    with SharedPass(model, [job], [2]):
        (loss,) = job_losses(model, tokenizer, rows, 1)
    loss.backward()
    leaves = {layer: [part.detach().double().requires_grad_() for part in pair] for layer, pair in job.factors.items()}
    dense = {}
    for layer in {*LAYERS, *beside.layers}:
        weight = model.get_submodule(layer).weight
        if layer in beside.layers:
            weight = weight + beside.delta(layer).double()
        if layer in leaves:
            a_RI, b_OR = leaves[layer]
            if layer in beside.layers:
                its = beside.layers[layer].a_RI.double()
                # the projection onto the rows of its a, by the pseudo-inverse
                a_RI = a_RI - a_RI @ torch.linalg.pinv(its) @ its
            weight = weight + 2.0 * b_OR @ a_RI
        dense[f"{layer}.weight"] = weight
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.prompt + row.target])
        logits = torch.func.functional_call(model, dense, kwargs={"input_ids": ids}).logits[0]
        start = len(row.prompt)
        total = total + torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")
        count += len(row.target)
    (total / count).backward()
    assert torch.allclose(loss.double(), total / count, rtol=1e-6)
    for layer, pair in job.factors.items():
        for own, expected in zip(pair, leaves[layer], strict=True):
            assert torch.allclose(own.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)


def test_a_resumed_call_knows_what_it_was_trained_beside(model, tokenizer, hub, answering, tmp_path):
    options = {"checkpoint": tmp_path / "kept", "target_modules": ["q_proj"], **TRAINED}
    (alone,) = remember(model, tokenizer, hub, {"one": "a b c."}, **options)
    (beside,) = remember(model, tokenizer, hub, {"one": "a b c."}, beside=answering, **options)
    (again,) = remember(model, tokenizer, hub, {"one": "a b c."}, beside=answering, **options)
    assert alone.hash != beside.hash == again.hash
    assert hub["one"].card["recipe"]["beside"] == {"hash": answering.hash, "name": "answering"}


def test_a_text_is_split_at_ends_of_sentences_and_lines():
    assert split(" One. Two 2.5 m?  Three!\n\nFour ") == ["One.", "Two 2.5 m?", "Three!", "Four"]


def test_what_cannot_be_remembered_is_refused_before_anything_is_trained(model, tokenizer, hub, answering):
    def call(documents, **options):
        return remember(model, tokenizer, hub, documents, **{**TRAINED, **options})

    with pytest.raises(TrainingError, match=r"documents are \['a b'\]; pass \{name: text\}"):
        call(["a b"])
    with pytest.raises(TrainingError, match=r"documents are \{\}"):
        call({})
    with pytest.raises(InvalidTask, match=r"document .one. has no sentence of two words or more: .a\. b\.."):
        call({"one": "a. b."})
    with pytest.raises(UnknownName, match="questions are about 'two', which is not a document; there are one"):
        call({"one": "a b"}, questions={"two": [("a", "b")]})
    with pytest.raises(TrainingError, match=r"stored in a hub, but got 'memories': pass lw.Hub\(path\)"):
        remember(model, tokenizer, "memories", {"one": "a b"}, **TRAINED)
    with pytest.raises(InvalidName, match="an adapter's name"):
        call({" one": "a b"})
    with pytest.raises(AdapterUnsupported, match="the description of adapter 'one' has 200,000 bytes; the limit is 100,000"):
        call({"one": "a b " * 50_000})
    with pytest.raises(TrainingError, match="rewrites"):
        call({"one": "a b"}, rewrites=-1)
    with pytest.raises(TrainingError, match="new adapters that are trained apart, so start must be left out"):
        lw.train_adapters(model, tokenizer, {"one": [("a", "b")]}, start={"one": answering}, kind=Beside(answering))
    with pytest.raises(TrainingError, match="kind is 'beside'; leave it out, or pass a kind of jobs"):
        lw.train_adapters(model, tokenizer, {"one": [("a", "b")]}, kind="beside")
    with pytest.raises(TrainingError, match="nothing can be trained beside 'answering': pass an Adapter"):
        call({"one": "a b"}, beside="answering")
    layer = next(iter(answering.layers))
    biased = {**answering.layers, layer: replace(answering.layers[layer], bias_O=torch.ones(16))}
    with pytest.raises(AdapterUnsupported, match=r"nothing can be trained beside adapter .answering.: layer .* has bias_O"):
        call({"one": "a b"}, beside=replace(answering, layers=biased))
    full = replace(answering, layers={layer: lw.Factors(torch.eye(16), torch.ones(16, 16))})
    with pytest.raises(TrainingError, match="reads all 16 directions of its inputs; give one of a lower rank"):
        call({"one": "a b"}, beside=full, target_modules=["q_proj"])
    assert len(hub) == 0
