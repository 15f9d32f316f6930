"""An expert model in what transformers does with models: pipelines, Trainer, and questions about class and signature."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments, pipeline

import loraweave as lw
from loraweave.composer.experts.expert_model import ExpertModel

IDS_BT = torch.tensor([[3, 9, 27, 20], [6, 2, 25, 3]])
ROWS = [{"input_ids": IDS_BT[row % 2], "labels": IDS_BT[row % 2], "task": "law"} for row in range(4)]


@pytest.fixture(autouse=True)
def no_accelerator_left():
    """A Trainer leaves its precision to the next one of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def made(make_model):
    """Drawn experts of one adapter for each of two tasks, live on a tiny llama."""
    made = lw.experts("moelora", make_model("llama"), tasks=("law", "games")).eval()
    with torch.no_grad():
        for value in made.expert_parameters().values():
            value.normal_(std=0.3)
    with made:
        yield made


@pytest.fixture
def mola(make_model):
    made = lw.experts("mola", make_model("llama"), num_experts=(2,), rank=2, target_modules=("q_proj", "v_proj")).eval()
    with torch.no_grad():
        for value in made.expert_parameters().values():
            value.normal_(std=0.3)
    with made:
        yield made


def trainer(model, folder, **settings):
    arguments = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 3}
    args = TrainingArguments(output_dir=str(folder), **{**arguments, **settings})
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in ROWS] if model.tasks == () else ROWS
    return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)


def test_what_the_base_answers_about_itself_its_expert_model_answers_too(made):
    base = made.base_model
    assert made.can_generate() is True
    assert made.config is base.config
    assert (made.device, made.dtype) == (base.device, base.dtype)
    assert made.get_input_embeddings() is base.get_input_embeddings()
    assert made.main_input_name == "input_ids"
    made.tie_weights()
    with pytest.raises(AttributeError, match="colour"):
        _ = made.colour


def test_it_is_of_both_classes_and_takes_the_bases_arguments_and_a_task(made):
    assert isinstance(made, ExpertModel)
    assert isinstance(made, LlamaForCausalLM)
    assert isinstance(made, PreTrainedModel)
    own = inspect.signature(made.forward).parameters
    assert set(own) == {*inspect.signature(LlamaForCausalLM.forward).parameters} - {"self"} | {"task"}


def test_a_generation_config_that_is_set_is_followed(made):
    made.generation_config = GenerationConfig(max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    assert made.generate(IDS_BT, task="law").shape == (2, 6)
    assert made.base_model.generation_config is made.generation_config


@pytest.mark.parametrize("again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_and_pickles_are_expert_models_that_answer_the_same(made, again):
    other = again(made)
    assert isinstance(other, ExpertModel)
    assert isinstance(other, LlamaForCausalLM)
    assert torch.equal(other(IDS_BT, task="law").logits, made(IDS_BT, task="law").logits)
    other.close()


def test_a_pipeline_answers_with_the_experts_and_takes_the_class_for_its_own(mola, tokenizer):
    complaints = []
    handler = logging.Handler()
    handler.emit = lambda record: complaints.append(record.getMessage())
    logger = logging.getLogger("transformers.pipelines.base")
    logger.addHandler(handler)
    try:
        features = pipeline("feature-extraction", model=mola, tokenizer=tokenizer, return_tensors=True)
        texts = pipeline("text-generation", model=mola, tokenizer=tokenizer)
    finally:
        logger.removeHandler(handler)
    assert complaints == []
    ids = tokenizer("ab", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(features("ab"), mola(**ids).logits)
        assert not torch.equal(features("ab"), mola.base_model(**ids).logits)
    [found] = texts("ab", max_new_tokens=5, do_sample=False, return_tensors=True)
    wanted = mola.generate(**ids, max_new_tokens=5, do_sample=False)
    assert found["generated_token_ids"] == wanted[0].tolist()


def test_a_trainer_trains_experts_saves_them_alone_and_resumes_to_the_same_numbers(mola, tmp_path):
    start = {name: value.clone() for name, value in mola.expert_state().items()}
    base = {name: value.clone() for name, value in mola.base_model.state_dict().items()}
    first = trainer(mola, tmp_path / "run")
    first.train()
    trained = {name: value.clone() for name, value in mola.expert_state().items()}
    assert any(not torch.equal(value, start[name]) for name, value in trained.items())
    assert all(torch.equal(value, base[name]) for name, value in mola.base_model.state_dict().items())
    saved = tmp_path / "run" / "checkpoint-1"
    assert json.loads((saved / "experts.json").read_text())["recipe"] == "mola"
    mola.load_state_dict(start, strict=False)
    trainer(mola, tmp_path / "run").train(resume_from_checkpoint=str(saved))
    for name, value in mola.expert_state().items():
        assert torch.equal(value, trained[name])
    # beside the checkpoints, which stay
    first.save_model()
    again = lw.experts(tmp_path / "run", copy.deepcopy(mola.base_model))
    assert torch.equal(again.eval()(IDS_BT).logits, mola.eval()(IDS_BT).logits)
    assert (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").is_file()


def test_a_trainer_gives_the_model_its_columns_of_which_one_is_the_task(made, tmp_path):
    class Collected(Exception):
        pass

    def collate(rows):
        raise Collected(sorted(rows[0]))

    run = trainer(made, tmp_path)
    run.data_collator = collate
    with pytest.raises(Collected, match=r"\['input_ids', 'labels', 'task'\]"):
        run.train()


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_trains_experts_on_a_quantised_base(tmp_path):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    from tiny_models import write_tiny_base
    from transformers import BitsAndBytesConfig

    write_tiny_base(tmp_path / "base")
    base, _ = lw.load_base(tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device="cpu")
    ids = torch.tensor([3, 1, 3])
    with lw.experts("mola", base, num_experts=(2,), rank=2, target_modules=("q_proj",)) as made:
        args = TrainingArguments(
            str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
        )
        found = Trainer(model=made, args=args, train_dataset=[{"input_ids": ids, "labels": ids}] * 4).train()
        assert found.training_loss > 0
