"""What `loraweave compose` is given: rows from a pipe or a terminal, and the dtype of the base."""

import json

import pytest
import torch
from command_line import call

import loraweave as lw


def composed_task(monkeypatch, base, *words, **options):
    """The task that `compose --examples -` would learn, and the command as it ended there."""
    seen = []
    monkeypatch.setattr(
        "loraweave.composer.compose.compose.compose", lambda *given, **options: seen.append(given[3]) or 1 / 0
    )
    done = call("compose", "--pool", "pool", "--base", base, "--examples", "-", *words, **options)
    assert seen or done.exit_code == 1, done.output
    return (seen[0] if seen else None), done


def test_compose_reads_lines_of_json_from_a_pipe(two, base, monkeypatch):
    task, _ = composed_task(monkeypatch, base, input='{"input": "a", "target": "b"}\n\n{"prompt": "c", "completion": "d"}\n')
    assert task.examples == (("a", "b"), ("c", "d"))


def test_compose_makes_a_chat_of_messages_and_of_texts_under_a_system(two, base, monkeypatch):
    turns = [{"role": role, "content": text} for role, text in (("system", "Next."), ("user", "a"), ("assistant", "b"))]
    read, _ = composed_task(monkeypatch, base, input=json.dumps({"messages": turns}) + "\n")
    made, _ = composed_task(monkeypatch, base, "--system", "Next.", input='{"input": "a", "output": "b"}\n')
    assert read == made == lw.Task([("a", "b")], chat=True, system="Next.")


@pytest.mark.parametrize(
    ("given", "said"), [("", "- has no rows"), ("a,b\n", "stdin line 1 is not JSON"), ("[1]\n", "stdin line 1 is")]
)
def test_compose_refuses_other_lines_of_a_pipe_by_their_number(two, base, given, said, monkeypatch):
    task, done = composed_task(monkeypatch, base, input=given)
    assert (task, done.exit_code) == (None, 1)
    assert f"InvalidTask: {said}" in done.stderr


def test_compose_asks_at_a_terminal_until_an_input_is_empty(two, base, monkeypatch):
    # the runner's stdin is no terminal
    monkeypatch.setattr("loraweave.cli._inputs.is_terminal", lambda: True)
    task, done = composed_task(monkeypatch, base, input="a\nb\nc\nd\n\n")
    assert task.examples == (("a", "b"), ("c", "d"))
    assert (done.stderr.count("input:"), done.stderr.count("target:")) == (3, 2)


@pytest.mark.parametrize(("words", "wanted"), [((), torch.float32), (("--dtype", "bfloat16"), torch.bfloat16)])
def test_the_base_is_computed_in_the_dtype_asked_for(two, base, monkeypatch, words, wanted):
    seen = []
    monkeypatch.setattr(
        "loraweave.composer.compose.compose.compose", lambda model, *_, **__: seen.append(model.dtype) or 1 / 0
    )
    call("compose", "--pool", "pool", "--base", base, "--examples", "-", *words, input='{"input": "a", "target": "b"}')
    assert seen == [wanted]


def test_a_dtype_that_is_none_is_refused_with_those_there_are(two, rows):
    done = call("compose", "--pool", "pool", "--examples", rows, "--dtype", "int8")
    assert done.exit_code == 2
    assert "float32, bfloat16, float16, fast, not 'int8'" in " ".join(done.stderr.split())
