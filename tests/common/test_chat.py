"""Conversations and what a chat template makes of them, against transformers' own call and TRL's SFTTrainer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

import loraweave as lw
from loraweave.common.chat import Conversation, answered_ids, prompt_ids, turn_end
from loraweave.common.rows import read_row
from loraweave.composer.model.batches import IGNORED, encode
from loraweave.composer.model.scoring import encode_pairs
from loraweave.composer.train.rows import pack_task
from loraweave.errors import InvalidTask
from loraweave.hub.gguf_base import gguf_base

# what TRL asks of a template: the assistant's part between marks, its end included
TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'assistant' %}a: {% generation %}{{ turn.content }}\n{% endgeneration %}"
    "{% else %}{{ turn.role[0] }}: {{ turn.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
SYSTEM, CAT, CATS, DOG, DOGS = (
    {"role": role, "content": content}
    for role, content in (
        ("system", "Plural."),
        ("user", "cat"),
        ("assistant", "cats"),
        ("user", "dog?"),
        ("assistant", "dogs"),
    )
)
ROWS = [[CAT, CATS], [SYSTEM, DOG, DOGS], [SYSTEM, CAT, CATS, DOG, DOGS]]


@pytest.fixture
def chatty(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def trl_rows(model, tokenizer, rows, folder, **settings):
    """(ids, labels) of each row as SFTTrainer makes them."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    config = trl.SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **settings)
    made = trl.SFTTrainer(model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in made.train_dataset]


def own_rows(model, tokenizer, rows):
    """The same of a Task's rows: the prompt has no loss."""
    task = lw.Task(rows)
    found = encode_pairs(model, tokenizer, task, task.examples)
    return [(row.prompt + row.target, (IGNORED,) * len(row.prompt) + row.target) for row in found]


# TRL's own settings warn of a name that transformers will take away
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("base", ["tiny", pytest.param("SmolLM2", marks=pytest.mark.slow)])
@pytest.mark.own_models
def test_rows_are_those_of_trl_token_for_token_with_their_loss(base, chatty, tiny_llama, tmp_path):
    tokenizer = chatty if base == "tiny" else AutoTokenizer.from_pretrained(gguf_base(None).folder(), local_files_only=True)
    own = own_rows(tiny_llama, tokenizer, [{"messages": messages} for messages in ROWS])
    as_prompts = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in ROWS]
    assert own == trl_rows(tiny_llama, tokenizer, as_prompts, tmp_path)
    assert own == own_rows(tiny_llama, tokenizer, as_prompts)
    # of messages, TRL learns the prompt too by default; all answers where it is asked to
    as_messages = [{"messages": messages} for messages in ROWS]
    assert [ids for ids, _ in own] == [ids for ids, _ in trl_rows(tiny_llama, tokenizer, as_messages, tmp_path)]
    if base == "tiny":
        assert own[:2] == trl_rows(tiny_llama, tokenizer, as_messages, tmp_path, assistant_only_loss=True)[:2]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.own_models
def test_a_packed_row_of_a_chat_is_a_conversation_with_all_answers_learned_as_in_trl(chatty, tiny_llama, tmp_path):
    pairs = [(f"{letter} {number}", f"{letter}{number}") for number, letter in enumerate("abcde")]
    packed = pack_task(tiny_llama, chatty, lw.Task(pairs, chat=True, system="Plural.", demonstrations=True), seed=3)
    rows = []
    for row in packed[:5]:
        asked = chatty.decode(row.prompt + row.target).removeprefix("s: Plural.\n").removesuffix("\n").split("\n")
        said = [{"role": "user" if line[0] == "u" else "assistant", "content": line[3:]} for line in asked]
        rows.append({"messages": [SYSTEM, *said]})
    found = trl_rows(tiny_llama, chatty, rows, tmp_path, assistant_only_loss=True)
    assert found == [(row.prompt + row.target, (IGNORED,) * len(row.prompt) + row.labels) for row in packed[:5]]
    assert sorted(found[0][1]) != sorted(found[0][0])


def test_ids_are_those_of_apply_chat_template_and_texts_keep_their_own(chatty):
    chat = Conversation.read([SYSTEM, CAT], "x")
    expected = chatty.apply_chat_template([SYSTEM, CAT], add_generation_prompt=True)["input_ids"]
    assert prompt_ids(chatty, ["cat", chat, "dog"]) == [chatty("cat")["input_ids"], expected, chatty("dog")["input_ids"]]
    whole = chatty.apply_chat_template([SYSTEM, CAT, CATS])["input_ids"]
    assert answered_ids(chatty, chat, "cats") == (expected, whole[len(expected) :])
    assert turn_end(chatty, chat) == "\n"


def test_a_template_that_writes_the_prompt_otherwise_once_answered_is_refused(chatty, tiny_llama):
    chatty.chat_template = TEMPLATE.replace("generation_prompt %}a: ", "generation_prompt %}a: x")
    with pytest.raises(InvalidTask, match=r"the chat template writes 'x' after the prompt 'cat' alone, and 'c' there once"):
        encode(tiny_llama, chatty, [Conversation.read([CAT], "x")], ["cats"])


@pytest.mark.parametrize(
    ("template", "said"),
    [(None, "no chat template, and messages need one"), ("{{ raise_exception('no system') }}", "refuses .*: no system")],
)
def test_a_template_that_is_missing_or_refuses_is_named(chatty, template, said):
    chatty.chat_template = template
    with pytest.raises(InvalidTask, match=said):
        prompt_ids(chatty, [Conversation.read([SYSTEM, CAT], "x")])


def turns(task, asked):
    return list(task.prompt(asked).turns)


def test_a_chat_task_puts_plain_rows_into_turns():
    task = lw.Task([("cat", "cats")], chat=True, system="Plural.")
    assert turns(task, "dog") == [("system", "Plural."), ("user", "dog")]
    assert turns(lw.Task([("cat", "cats")], chat=True, instruction="Say."), "dog") == [("user", "Say.\n\ndog")]
    task = lw.Task([("cat", "cats")], chat=True, instruction="Say.", template="<{input}> {instruction}")
    assert turns(task, "dog {input}") == [("user", "<dog {input}> Say.")]


def test_demonstrations_of_a_chat_are_earlier_turns_and_never_the_input_itself():
    task = lw.Task([("cat", "cats"), ("ox", "oxen")], chat=True, system="Plural.", demonstrations=True)
    shown = [("user", "cat"), ("assistant", "cats"), ("user", "ox"), ("assistant", "oxen")]
    assert turns(task, "dog") == [("system", "Plural."), *shown, ("user", "dog")]
    assert turns(task, "cat") == [("system", "Plural."), *shown[2:], ("user", "cat")]
    # the same input as messages
    assert turns(task, Conversation((("user", "cat"),))) == turns(task, "cat")


def test_messages_make_a_chat_with_the_system_that_all_have():
    task = lw.Task([{"messages": [SYSTEM, CAT, CATS]}, {"messages": [SYSTEM, DOG, DOGS]}])
    assert (task.chat, task.system, task.instruction) == (True, "Plural.", "")
    assert task.examples == (("cat", "cats"), ("dog?", "dogs"))
    assert turns(task, "ox") == [("system", "Plural."), ("user", "ox")]
    others = lw.Task([{"messages": row} for row in ROWS])
    assert others.system == ""
    for (asked, target), row in zip(others.examples, ROWS, strict=True):
        assert [*others.prompt(asked).messages, {"role": "assistant", "content": target}] == row
    # so does a part of the rows
    part = replace(others, examples=others.examples[1:2])
    assert turns(part, others.examples[2][0])[0] == ("system", "Plural.")
    assert turns(part, "ox") == [("user", "ox")]
    # a system that is given takes their place, as an instruction does
    assert turns(replace(others, system="Say."), others.examples[1][0]) == [("system", "Say."), ("user", "dog?")]


def test_messages_are_texts_where_the_task_says_so():
    task = lw.Task([{"messages": row} for row in ROWS[1:]], chat=False)
    assert task == lw.Task([("dog?", "dogs"), ("user: cat\nassistant: cats\nuser: dog?", "dogs")], instruction="Plural.")
    assert task.prompt(Conversation.read([CAT], "x")) == task.prompt("cat")


def test_texts_beside_messages_and_a_system_without_a_chat_are_refused():
    with pytest.raises(InvalidTask, match=r"example 2 has messages, and example 1 has texts .*chat=True .*chat=False"):
        lw.Task([("ox", "oxen"), {"messages": [CAT, CATS]}])
    assert lw.Task([("ox", "oxen"), {"messages": [CAT, CATS]}], chat=True).examples == (("ox", "oxen"), ("cat", "cats"))
    with pytest.raises(InvalidTask, match="system is a turn of a chat: pass chat=True"):
        lw.Task([("ox", "oxen")], system="Plural.")


def test_rows_without_a_task_are_asked_as_they_are():
    plain = lw.Task(())
    assert plain.prompt_of(read_row({"messages": [SYSTEM, CAT, CATS]}, "x")).messages == [SYSTEM, CAT]
    assert plain.prompt_of(read_row({"prompt": "cat:", "completion": "cats"}, "x")) == "cat:"
    assert (
        lw.Task((), chat=False).prompt_of(read_row({"messages": [SYSTEM, CAT, CATS]}, "x")) == "Plural.\nInput: cat\nOutput:"
    )
