"""A composition whose base answers for it in a block: what takes a model gets what the merged model gives."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import Trainer, TrainingArguments, pipeline

import loraweave as lw
from loraweave.errors import CompositionError, ScopeError

# peft's own
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def no_accelerator_left():
    """A Trainer leaves its precision to the next one of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def composition(compose_on):
    return compose_on(method="manual", weights={"c": -0.8, "a": 1.5})


@pytest.fixture
def merged(composition, tiny_llama, tmp_path):
    """The base with the exported adapter merged into its weights by peft."""
    composition.export(tmp_path / "peft")
    return PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "peft").merge_and_unload().eval()


def test_a_pipeline_in_the_block_gives_what_it_gives_of_the_merged_model(composition, merged, tiny_llama, tokenizer):
    def answers(model):
        features = pipeline("feature-extraction", model=model, tokenizer=tokenizer, return_tensors=True)
        texts = pipeline("text-generation", model=model, tokenizer=tokenizer)
        [found] = texts("ab", max_new_tokens=6, do_sample=False, return_tensors=True)
        return features("ab"), found["generated_token_ids"]

    base_logits, _ = answers(tiny_llama)
    with composition.activate() as model:
        assert model is tiny_llama
        logits, ids = answers(model)
    wanted, wanted_ids = answers(merged)
    assert torch.allclose(logits, wanted, atol=1e-4)
    assert not torch.allclose(logits, base_logits, atol=1e-2)
    assert ids == wanted_ids
    assert torch.equal(answers(tiny_llama)[0], base_logits)


@pytest.mark.own_models
def test_a_trainer_in_the_block_evaluates_the_composition(composition, merged, tmp_path):
    ids = torch.tensor([3, 9, 27, 20])
    rows = [{"input_ids": ids, "labels": ids}] * 2

    def loss(model):
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        return Trainer(model=model, args=args).evaluate(rows)["eval_loss"]

    with composition.activate() as model:
        found = loss(model)
    assert found == pytest.approx(loss(merged), rel=1e-5)


def test_a_composition_with_a_router_answers_by_it_in_the_block(compose_on, pool, tiny_llama):
    composition = compose_on(method="arrow", top_k=2, folds=0)
    ids = torch.tensor([[3, 9, 27, 20]])
    with torch.no_grad(), composition.activate() as model:
        found = model(ids).logits
    with torch.no_grad(), lw.Composer(tiny_llama, pool).activate(lw.router("arrow", pool, top_k=2)):
        assert torch.equal(found, tiny_llama(ids).logits)


def test_an_average_of_members_is_no_one_model(composition):
    average = replace(composition, members={"one": composition, "other": composition})
    with pytest.raises(ScopeError, match="cannot answer as one model"), average.activate():
        pass


def test_a_composition_has_a_pipeline_of_its_own(composition, merged, tokenizer):
    def ids(writer):
        return [found["generated_token_ids"] for (found,) in writer(text for text in ("ab", "c d"))]

    options = {"max_new_tokens": 6, "do_sample": False, "return_tensors": True}
    writer = composition.pipeline(**options)
    assert ids(writer) == ids(pipeline("text-generation", model=merged, tokenizer=tokenizer, **options))
    with pytest.raises(CompositionError, match=r"composition\.pipeline\(\) is one for text"):
        pipeline("text-generation", model=composition, tokenizer=tokenizer)
    with pytest.raises(ScopeError, match="cannot be a pipeline"):
        replace(composition, members={"one": composition}).pipeline()


def test_a_composition_called_and_asked_to_generate_predicts(composition):
    assert composition(["ab"]) == composition.generate(["ab"]) == composition.predict(["ab"])
