"""A task that is a chat: losses, answers and labels by hand from the template's tokens, and what keeps them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.composer.train.rows import Owners, RowReader
from loraweave.errors import CompositionError, InvalidTask

TEMPLATE = (
    "{% for turn in messages %}{{ turn.role[0] }}: {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
PAIRS = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe")]
LONG = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ab"}, {"role": "user", "content": "b"}]


@pytest.fixture(autouse=True)
def template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)


@pytest.fixture
def task():
    return lw.Task(PAIRS, chat=True, system="Swap.")


def text_of(asked, system="Swap.", shown=()):
    """The prompt, written out."""
    turns = "".join(f"u: {given}\na: {answer}\n" for given, answer in shown)
    return f"s: {system}\n{turns}u: {asked}\na: "


def losses_by_hand(model, tokenizer, prompts, answers):
    """(sum, mean) of -log p of the answer's characters and of the line's end."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, start = tokenizer(prompt + answer + "\n")["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        each = [-float(log_p[place - 1, ids[place]]) for place in range(start, len(ids))]
        found.append((sum(each), sum(each) / len(each)))
    return found


def said_by_hand(model, tokenizer, prompt):
    """The greedy continuation up to the line's end."""
    ids = tokenizer(prompt)["input_ids"]
    start, (end,) = len(ids), tokenizer("\n")["input_ids"]
    while (len(ids) - start < 48 and ids[-1] not in (end, tokenizer.eos_token_id)) or len(ids) == start:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_losses_and_answers_are_those_of_the_templates_text(compose_on, task, tiny_llama, tokenizer):
    found = compose_on(task=task, method="uniform")
    prompts = [text_of(asked) for asked, _ in PAIRS]
    with lw.Composer(tiny_llama, [found.adapter]).activate({found.adapter.name: 1.0}):
        means = [mean for _, mean in losses_by_hand(tiny_llama, tokenizer, prompts, [answer for _, answer in PAIRS])]
        said = [said_by_hand(tiny_llama, tokenizer, prompt) for prompt in prompts]
        later = said_by_hand(tiny_llama, tokenizer, "s: Swap.\nu: a\na: ab\nu: b\na: ")
    assert found.losses() == pytest.approx(means, rel=1e-5)
    assert found.predict([asked for asked, _ in PAIRS]) == said
    assert found.predict([[{"role": "user", "content": "a"}], {"messages": LONG}, "b"]) == [said[0], later, said[1]]
    assert found.evaluate(PAIRS)["loss"] == pytest.approx(sum(means) / 5, rel=1e-5)


def test_labels_are_ranked_by_the_tokens_of_their_whole_turn(compose_on, task, tiny_llama, tokenizer):
    labels = ["x", "yy", "DD"]
    asked = replace(task, examples=[("a", "x"), ("b", "yy")], labels=labels)
    found = compose_on(task=asked, method="base")
    inputs = ["a", "b", "e f", "d d d"]
    sums = [[losses_by_hand(tiny_llama, tokenizer, [text_of(text)], [label])[0][0] for label in labels] for text in inputs]
    assert found.predict(inputs) == [labels[row.index(min(row))] for row in sums]


@pytest.mark.parametrize("method", ["few_shot", "auto"])
def test_demonstrations_are_earlier_turns_in_every_prompt(compose_on, task, tiny_llama, tokenizer, method):
    found = compose_on(task=task, method=method, folds=0, budget=200)
    asked = found.members["few_shot"] if method == "auto" else found
    assert asked.task.demonstrations == tuple(PAIRS)
    ids = tokenizer(text_of("x", shown=PAIRS))["input_ids"]
    with asked.activate():
        said = said_by_hand(tiny_llama, tokenizer, tokenizer.decode(ids))
    assert replace(asked, task=replace(asked.task, orders=1)).predict(["x"]) == [said]


def test_a_saved_composition_asks_the_same(compose_on, task, tiny_llama, tokenizer, tmp_path):
    asked = replace(task, examples=[*PAIRS, (LONG, "ba")], demonstrations=[("x", "y"), (LONG, "z")])
    found = compose_on(task=asked, method="uniform")
    found.save_pretrained(tmp_path / "kept")
    read = lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer)
    assert read.task == found.task
    assert read.task.prompt("q").messages == [
        {"role": "system", "content": "Swap."},
        *({"role": role, "content": content} for role, content in (("user", "x"), ("assistant", "y"))),
        *LONG,
        {"role": "assistant", "content": "z"},
        {"role": "user", "content": "q"},
    ]
    assert read.predict(["q", LONG]) == found.predict(["q", LONG])


def test_an_exported_adapter_says_with_which_messages_it_is_asked(compose_on, task, tmp_path):
    report = compose_on(task=task, method="uniform").export(tmp_path / "out")
    assert lw.Adapter.from_pretrained(report.folder).card["prompts"] == [
        [{"role": "system", "content": "Swap."}, {"role": "user", "content": "{input}"}]
    ]


def test_every_kind_of_training_learns_the_answers_tokens_alone(tiny_llama, tokenizer, pool):
    rows = [{"messages": [*LONG, {"role": "assistant", "content": "ba"}]}] * 2
    settings = {"steps": 1, "batch_size": 2, "progress": False}
    job = lw.train_adapters(tiny_llama, tokenizer, {"t": rows}, rank=1, held_out={"t": rows}, **settings).report.jobs["t"]
    prompt = "u: a\na: ab\nu: b\na: "
    expected = losses_by_hand(tiny_llama, tokenizer, [prompt], ["ba"])[0][1]
    assert job.held_out[0][1] == pytest.approx(expected, rel=1e-5)
    reader = RowReader(Owners.of(lw.router("mole", pool)), tiny_llama, tokenizer)
    beside = {"prompt": "a:", "completion": "b"}
    (row, other) = reader.read([rows[0], beside])
    assert tokenizer.decode(row.prompt) == prompt
    assert (tokenizer.decode(row.target), row.labels) == ("ba\n", row.target)
    assert tokenizer.decode(other.prompt) == "a:"


def test_generate_takes_conversations_beside_texts(tiny_llama, tokenizer, pool):
    engine = lw.Composer(tiny_llama, pool, tokenizer=tokenizer)
    mixtures = [{"a": 1.0}, {"b": 1.0}, None]
    given, texts = [LONG, "abc", LONG[:1]], ["u: a\na: ab\nu: b\na: ", "abc", "u: a\na: "]
    said = engine.generate(given, mixture=mixtures, max_new_tokens=7)
    assert said == engine.generate(texts, mixture=mixtures, max_new_tokens=7)
    pieces = list(engine.stream(given, mixture=mixtures, max_new_tokens=7))
    assert ["".join(part) for part in zip(*pieces, strict=True)] == said


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (LONG, CompositionError, "text 0 is .*put the messages of a conversation into a list of their own"),
        ([LONG[:2]], CompositionError, "text 0 ends with the assistant's turn"),
        ([[{"role": "user"}]], InvalidTask, "text 0 has {'role': 'user'} in turn 1 of its messages"),
        ([["a", "b"]], CompositionError, "text 0 is .* neither a text nor a conversation"),
    ],
)
def test_what_is_no_conversation_is_named(tiny_llama, tokenizer, pool, given, error, said):
    with pytest.raises(error, match=said):
        lw.Composer(tiny_llama, pool, tokenizer=tokenizer).generate(given)


def test_a_checkpoint_is_not_that_of_another_system(tiny_llama, tokenizer, task, tmp_path):
    settings = {"steps": 1, "rank": 1, "batch_size": 2, "progress": False}
    found = {
        system: lw.train_adapters(
            tiny_llama, tokenizer, {"t": replace(task, system=system)}, checkpoint=tmp_path / "kept", **settings
        )["t"].hash
        for system in ("Swap.", "Turn.", "Swap.")
    }
    alone = lw.train_adapters(tiny_llama, tokenizer, {"t": replace(task, system="Turn.")}, **settings)["t"].hash
    assert found["Turn."] == alone != found["Swap."]
