"""What every gate, and every call, can rely on."""

import pytest
import torch

import loraweave as lw
from loraweave.errors import CompositionError, ScopeError, TrainingError, UnknownName

IDS_BT = torch.tensor([[3, 9, 27, 20], [6, 2, 25, 3], [7, 8, 9, 10], [5, 4, 3, 11]])


def by_task(make_model, kind="llama", **options):
    """Experts weighed by two tasks, drawn."""
    return by_task_on(make_model(kind), **options)


def by_task_on(base, **options):
    return draw(lw.experts("moelora", base, tasks=("law", "games"), **options))


def draw(made):
    with torch.no_grad():
        for value in made.expert_parameters().values():
            value.normal_(std=0.3)
    return made


def test_two_tasks_for_four_rows_are_refused(make_model):
    with by_task(make_model) as made, pytest.raises(ScopeError, match="2 tasks were given for 4 rows"):
        made(input_ids=IDS_BT, task=["law", "games"])


def test_beams_of_a_prompt_have_its_task(make_model):
    with by_task(make_model) as made:
        options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        found = made.generate(IDS_BT[:2], task=["law", "games"], **options)
        alone = [made.generate(IDS_BT[row : row + 1], task=task, **options) for row, task in enumerate(made.tasks)]
        assert torch.equal(found, torch.cat(alone))


@pytest.mark.parametrize(("task", "error"), [([], ScopeError), (1.5, UnknownName), ([None], UnknownName)])
def test_a_task_that_is_none_is_refused_by_name(make_model, task, error):
    with by_task(make_model) as made, pytest.raises(error, match="task"):
        made(input_ids=IDS_BT, task=task)


def test_an_encoder_that_is_given_embeddings_has_the_experts_of_the_rows_tasks(make_model):
    with by_task(make_model, "t5", target_modules=("q", "v")) as made:
        options = {
            "task": ["law", "games", "games", "law"],
            "max_new_tokens": 3,
            "min_new_tokens": 3,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        by_ids = made.generate(input_ids=IDS_BT, **options)
        by_embeddings = made.generate(inputs_embeds=made.base_model.get_input_embeddings()(IDS_BT), **options)
        assert torch.equal(by_ids.sequences, by_embeddings.sequences)
        torch.testing.assert_close(by_ids.logits, by_embeddings.logits)


def test_a_loss_in_a_tuple_has_the_terms_too(make_model):
    with lw.experts("mixtral", make_model("llama"), num_experts=3).train() as made:
        loss, logits = made(input_ids=IDS_BT, labels=IDS_BT, return_dict=False, use_cache=False)
        assert made.terms["balance"] > 0
        torch.testing.assert_close(loss, made.own_loss + made.terms["balance"])
        torch.testing.assert_close(made.own_loss, made.base_model.loss_function(logits, IDS_BT, 61))


def test_what_was_frozen_by_hand_stays_so_when_tasks_become_known(make_model):
    with lw.experts("moelora", make_model("llama")) as made:
        made.gates.requires_grad_(False)
        made.take_tasks(("law", "games"))
        assert not any(parameter.requires_grad for parameter in made.gates.parameters())
        assert all(parameter.requires_grad for parameter in made.layers.parameters())


def test_an_adapter_of_two_tasks_at_once_is_refused(make_model):
    with by_task(make_model) as made, pytest.raises(ScopeError, match="2 are given"):
        made.adapter(["law", "games"])


def test_gates_weigh_in_their_own_precision_below_autocast(make_model):
    with lw.experts("mola", make_model("llama"), num_experts=(3, 4)) as made:
        seen = []
        for gate in made.gates.values():
            gate.register_forward_hook(lambda gate, args, weighing: seen.append((gate, args, weighing.w_BTE)))
        with torch.autocast("cpu", torch.bfloat16):
            made(input_ids=torch.tensor([[3, 9, 27, 20]]))
        assert len(seen) == 14
        for gate, (x_BTI, call), w_BTE in seen:
            assert w_BTE.dtype == torch.float32
            assert torch.equal(gate.forward(x_BTI, call).w_BTE, w_BTE)


def test_what_a_hook_of_someone_else_has_seen_of_a_layer_stays_as_it_was(make_model):
    base, seen = make_model("llama"), []
    base.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(lambda module, args, y: seen.append(y))
    base(input_ids=IDS_BT)
    with by_task_on(base) as made:
        made(input_ids=IDS_BT, task="law")
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_that_would_run_blocks_again_without_experts_is_refused(make_model, reentrant):
    base = make_model("llama")
    # its name in later versions of transformers
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    with by_task_on(base).train() as made:
        with pytest.raises(TrainingError, match="blocks again without their experts"):
            made(input_ids=IDS_BT, labels=IDS_BT, task="law", use_cache=False)
        made.gradient_checkpointing_enable()
        made(input_ids=IDS_BT, labels=IDS_BT, task="law", use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in made.expert_parameters().values())


def test_a_closed_model_does_not_answer_as_the_base(make_model):
    made = by_task(make_model)
    made.close()
    with pytest.raises(CompositionError, match="the expert model is closed"):
        made(input_ids=IDS_BT, task="law")
    with pytest.raises(CompositionError, match="the expert model is closed"):
        made.generate(IDS_BT, task="law")


def test_passes_of_a_trainers_step_add_up_to_the_mean_of_the_terms(make_model):
    with lw.experts("mixtral", make_model("llama"), num_experts=3, balance=5.0).train() as made:
        labels = IDS_BT.masked_fill(torch.tensor([[1, 0, 0, 0]]).bool(), -100)
        expected, found = 0.0, 0.0
        for rows, share in ((slice(0, 3), 0.75), (slice(3, 4), 0.25)):
            found = found + made(input_ids=IDS_BT[rows], labels=labels[rows], num_items_in_batch=12, use_cache=False).loss
            expected = expected + made.own_loss + share * made.terms["balance"]
        torch.testing.assert_close(found, expected)


def test_copies_of_data_parallel_which_would_have_no_experts_are_refused(make_model):
    with by_task(make_model) as made, pytest.raises(ScopeError, match="DataParallel would run copies without"):
        # what torch.nn.parallel.replicate asks of each module, where there are several GPUs
        made._replicate_for_data_parallel()


@pytest.mark.parametrize("name", ["mixtral", "octavius"])
def test_a_batch_of_no_rows_is_refused(make_model, name):
    made = lw.experts(name, make_model("llama"), rank=2)
    empty_BT = torch.zeros(0, 3, dtype=torch.long)
    with pytest.raises(ScopeError, match=r"inputs of shape \(0, 3\), with no rows"):
        made(input_ids=empty_BT)
    with pytest.raises(ScopeError, match=r"inputs of shape \(0, 3\), with no rows"):
        made.generate(input_ids=empty_BT, attention_mask=empty_BT, max_new_tokens=2)
