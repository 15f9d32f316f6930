"""Whatever takes rows reads every form of them equally, and refuses everything else by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from properties import Properties

import loraweave as lw
from loraweave.cli._inputs import read_rows as read_file
from loraweave.composer.compose.report import Report
from loraweave.composer.ensembles.ensemble import answers
from loraweave.composer.model.batches import text_rows
from loraweave.errors import InvalidTask
from loraweave.routers.tokens._text import labelled_tasks

PAIRS = [("one", "1"), ("two", "2"), ("three", "3")]
OTHERS = [("four of them", "9"), ("five", "8"), ("s", "66")]
PLAIN = lw.Task(())
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role[0] }}: {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


class Columns:
    """Like datasets.Dataset, with integers for labels."""

    column_names = ("text", "label")

    def __init__(self):
        label = type("ClassLabel", (), {"names": ["3", "2", "1"]})()
        self.features = {"text": None, "label": label}

    def __iter__(self):
        return ({"text": text, "label": 3 - int(target)} for text, target in PAIRS)


class Frame:
    """Like a pandas frame, whose iteration and length are those of columns and rows."""

    def __init__(self, rows):
        self._rows, self.columns = rows, list(rows[0])

    def __len__(self):
        return len(self._rows)

    def __iter__(self):
        return iter(self.columns)

    def __bool__(self):
        raise ValueError("the truth of a frame is ambiguous")

    def __getitem__(self, column):
        return [row[column] for row in self._rows]

    def to_dict(self, orient):
        assert orient == "records"
        return self._rows


def forms(folder, whole_prompts):
    """{what it is: the rows}; a prompt is the whole prompt where nothing else makes prompts."""
    rows = {"pairs": PAIRS, "lists": [list(pair) for pair in PAIRS], "data set": Columns()}
    for column, answer in (("input", "target"), ("prompt", "completion"), ("question", "answer"), ("text", "label")):
        whole = whole_prompts and column == "prompt"
        rows[column] = [{column: PLAIN.prompt(text) if whole else text, answer: target} for text, target in PAIRS]
    rows["frame"] = Frame(rows["question"])
    rows["jsonl"], rows["csv as text"] = folder / "rows.jsonl", str(folder / "rows.csv")
    rows["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows["text"]))
    (folder / "rows.csv").write_text("".join(f"{text},{target}\n" for text, target in [("input", "target"), *PAIRS]))
    return rows


def chat_forms(folder):
    """The same of rows whose input is a conversation."""
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": target}] for text, target in PAIRS]
    rows = {"messages": [{"messages": messages} for messages in turns]}
    rows["prompt"] = [{"prompt": [asked], "completion": [answer]} for asked, answer in turns]
    rows["jsonl"] = folder / "chat.jsonl"
    rows["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows["prompt"]))
    return rows


class Entrances:
    """What each entrance makes of rows, as what can be compared."""

    # those that take texts alone too
    TEXTS = ("predict", "answers", "inputs", "text_rows", "hub", "fit_fusion")
    # those that know no task, whose template would make prompts
    WHOLE_PROMPTS = ("router", "experts", "train_experts", "labelled")
    # those that apply the chat template to messages; in the others the texts of messages count, or a task says so
    TEMPLATE = (*WHOLE_PROMPTS, "leave_one_out", "train_adapters", "text_rows")

    def __init__(self, model, tokenizer, adapters, folder):
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.pool = lw.ExpertPool(adapters)
        report = Report((), "manual", "", (), 0.0, 0)
        task = lw.Task([("x", "y")], instruction="Do.")
        self.composition = lw.Composition(model, tokenizer, task, self.pool, {"a": 0.5}, "linear", report)

    def task(self, rows):
        return lw.Task(rows).examples

    def evaluate(self, rows):
        return self.composition.evaluate(rows)

    def leave_one_out(self, rows):
        return self._engine().leave_one_out(rows, {"a": 0.5}, progress=False)

    def answers(self, rows):
        return answers(self._engine(), [{"a": 1.0}, {"b": 1.0}], self.composition.task, rows)

    def predict(self, rows):
        return self.composition.predict(rows)

    def inputs(self, rows):
        settings = {"method": "gradient", "objective": "entropy", "inputs": rows, "budget": 9, "folds": 0, "progress": False}
        return lw.compose(self.model, self.tokenizer, self.pool, self.composition.task, **settings).mean_weights

    def train_adapters(self, rows):
        settings = {"rank": 1, "steps": 1, "batch_size": 2, "progress": False}
        return lw.train_adapters(self.model, self.tokenizer, {"t": rows}, **settings)["t"].hash

    def held_out(self, rows):
        settings = {"rank": 1, "steps": 1, "batch_size": 2, "progress": False, "held_out": {"t": rows}}
        task = lw.Task([("x", "y")], instruction="Do.")
        return lw.train_adapters(self.model, self.tokenizer, {"t": task}, **settings).report.jobs["t"].held_out

    def train_experts(self, rows):
        made = lw.experts("mola", self.model, num_experts=(2, 2), rank=1, target_modules=("q_proj",))
        job = {"t": (made, rows)}
        lw.train_experts(self.model, self.tokenizer, job, steps=1, batch_size=3, warmup=0, progress=False)
        return self._sums(made.expert_state())

    def experts(self, rows):
        made = lw.experts("mola", self.model, num_experts=(2, 2), rank=1, target_modules=("q_proj",))
        made.fit(rows, self.tokenizer, steps=1, batch_size=3, warmup=0, progress=False)
        return self._sums(made.expert_state())

    def router(self, rows):
        made = lw.router("mole", self.pool)
        made.fit(self._engine(), rows, steps=1, batch_size=3, progress=False)
        return made.training_report.losses

    def labelled(self, rows):
        return [
            (task.prompt(text), target) for task in labelled_tasks({"a": rows}).values() for text, target in task.examples
        ]

    def text_rows(self, rows):
        return text_rows(self.model, self.tokenizer, rows, max_tokens=256)

    def for_examples(self, rows):
        with lw.Hub(self.folder / "hub") as hub:
            hub.add(self.pool["a"], examples=[("one", "un"), ("two", "deux")])
            return [(hit.score, hit.evidence) for hit in lw.Retriever(hub, embedder="hashing").for_examples(rows)]

    def fit_fusion(self, rows):
        with lw.Hub(self.folder / "hub") as hub:
            hub.add_many(list(self.pool.adapters.values()))
            hub.update("a", examples=[("one", "un"), ("two", "deux")])
            hub.update("b", examples=[("cats", "2"), ("dogs", "1")])
            return lw.Retriever(hub, embedder="hashing", keys=("mean", "outputs")).fit_fusion({"a": rows}).weights

    def hub(self, rows):
        with lw.Hub(self.folder / "hub") as hub:
            hub.add(self.pool["a"], name="x")
            record = hub.update("x", examples=rows)
            return record.examples, record.card["outputs"]

    def _engine(self):
        return lw.Composer(self.model, self.pool, tokenizer=self.tokenizer)

    @staticmethod
    def _sums(tensors):
        return {name: float(np.square(tensor.detach().double().numpy()).sum()) for name, tensor in tensors.items()}


NAMES = [name for name in vars(Entrances) if name.islower() and not name.startswith("_")]
PROPERTIES = Properties(NAMES)


@PROPERTIES.given
def entrances(make_model, tokenizer, make_adapter, tmp_path):
    model = make_model("llama")
    return Entrances(model, tokenizer, [make_adapter(model, name, seed=seed) for seed, name in enumerate("ab")], tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_an_entrance_keeps_all_properties(name, request, make_model, tokenizer, make_adapter):
    PROPERTIES.walk(request, name, make_model=make_model, tokenizer=tokenizer, make_adapter=make_adapter)


@PROPERTIES.add()
def every_entrance_reads_every_form_equally(entrances, name, tmp_path):
    found = {}
    for form, rows in forms(tmp_path, name in Entrances.WHOLE_PROMPTS).items():
        # what is drawn at the beginning of experts and routers
        torch.manual_seed(0)
        # a text is a sample input for a hub, also one that ends like the name of a file
        found[form] = getattr(entrances, name)(rows if (name, form) != ("hub", "csv as text") else tmp_path / "rows.csv")
    assert found == dict.fromkeys(found, found["pairs"])
    torch.manual_seed(0)
    assert getattr(entrances, name)(OTHERS) != found["pairs"]


@PROPERTIES.add()
def every_entrance_reads_every_form_of_messages_equally(entrances, name, tmp_path, monkeypatch):
    monkeypatch.setattr(entrances.tokenizer, "chat_template", TEMPLATE)
    found = {}
    for form, rows in chat_forms(tmp_path).items():
        torch.manual_seed(0)
        found[form] = getattr(entrances, name)(rows)
    assert found == dict.fromkeys(found, found["messages"])
    torch.manual_seed(0)
    assert (getattr(entrances, name)(PAIRS) == found["messages"]) == (name not in Entrances.TEMPLATE)


@PROPERTIES.add(of=sorted({*Entrances.TEMPLATE} - {"labelled"}))
def messages_without_a_template_are_refused_with_the_way_out(entrances, name, tmp_path):
    with pytest.raises(InvalidTask, match=r"tokenizer has no chat template, .* chat=False"):
        getattr(entrances, name)(chat_forms(tmp_path)["messages"])


NO_ROWS = (["ab", "cd"], [{"foo": 1}], "walk", 3, None, [("one", "1"), ("two", 2)])
# texts are inputs, nothing is no change, targets are not looked at, and a number is a wrong setting
TAKEN = [(name, ["ab", "cd"]) for name in Entrances.TEXTS]
TAKEN += [
    ("hub", "walk"),
    ("hub", None),
    ("predict", NO_ROWS[-1]),
    ("answers", NO_ROWS[-1]),
    ("inputs", NO_ROWS[-1]),
    ("inputs", None),
    ("held_out", 3),
    ("held_out", None),
]


def every_entrance_refuses_what_is_no_rows(entrances, name, rows):
    if isinstance(rows, list):
        places = r"(row|example|input|text) [12]\b"
    else:
        places = rf"got {rows!r}, not rows|got the text {rows!r} alone: give a list of texts"
    with pytest.raises(InvalidTask, match=places):
        getattr(entrances, name)(rows)


for rows in NO_ROWS:
    refusing = [name for name in NAMES if (name, rows) not in TAKEN]
    PROPERTIES.add(of=refusing, rows=[rows])(every_entrance_refuses_what_is_no_rows)


def test_a_file_on_the_command_line_is_read_the_same(tmp_path):
    written = forms(tmp_path, False)
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.csv"):
        assert read_file(path, split="train").examples() == PAIRS
    assert written["csv as text"].endswith("rows.csv")


def test_the_loss_of_rows_is_that_of_their_texts_and_not_of_their_columns(make_model, tokenizer, make_adapter, tmp_path):
    composition = entrances(make_model, tokenizer, make_adapter, tmp_path).composition
    rows = [{"input": text, "target": target} for text, target in PAIRS]
    loss = composition.evaluate(rows)["loss"]
    assert loss == composition.evaluate(PAIRS)["loss"]
    assert loss != composition.evaluate([("input", "target")] * 3)["loss"]
