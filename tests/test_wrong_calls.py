"""Wrong calls of public names end in an error of ours that is one line to read, never in one of Python's or a library's."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from typer.testing import CliRunner

import loraweave as lw
from loraweave.cli import app
from loraweave.extensions.study import study
from loraweave.types import Factors

CHAT = [{"role": "user", "content": "a"}]
NAN = math.nan


@pytest.fixture(scope="module")
def world(make_model, make_adapters, tokenizer, tmp_path_factory):
    """A model, adapters "a", "b" and "c" for it, and one of each thing that is made of them."""
    model = make_model("llama")
    adapters = [dataclasses.replace(adapter, base_model="tiny") for adapter in make_adapters(model, "llama")]
    pool = lw.ExpertPool(adapters)
    task = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")])
    composed = lw.compose(model, tokenizer, pool, task, method="uniform", progress=False)
    folder = tmp_path_factory.mktemp("world")
    with lw.Hub(folder / "hub") as hub:
        for adapter in adapters:
            hub.add(adapter)
        yield SimpleNamespace(
            model=model,
            tokenizer=tokenizer,
            adapters=adapters,
            pool=pool,
            task=task,
            composed=composed,
            engine=lw.Composer(model, pool, tokenizer=tokenizer),
            folder=folder,
            hub=hub,
            pipeline=SimpleNamespace(model=model, tokenizer=tokenizer),
        )


def broken(value):
    """An adapter in memory, one of whose numbers is no number."""
    a_RI = torch.ones(2, 16)
    a_RI[0, 0] = value
    return lw.Adapter("broken", "tiny", {"model.layers.0.self_attn.q_proj": Factors(a_RI, torch.ones(16, 2))})


def licensed(world, *licenses):
    """The first adapters, each under its license."""
    pairs = zip(world.adapters, licenses, strict=False)
    return [dataclasses.replace(adapter, card={**adapter.card, "license": license}) for adapter, license in pairs]


def compose(world, experts=None, task=None, **options):
    experts = world.pool if experts is None else experts
    return lw.compose(world.model, world.tokenizer, experts, task or world.task, progress=False, **options)


ROWS = {
    "a task of a text": lambda w: lw.Task("walk"),
    "a task of numbers": lambda w: lw.Task([1, 2]),
    "a task of triples": lambda w: lw.Task([("a", "b", "c")]),
    "a task of an empty target": lambda w: lw.Task([("a", " ")]),
    "a task without a known metric": lambda w: lw.Task([("a", "b")], metric="accurcy"),
    "a task with a target that is no label": lambda w: lw.Task([("a", "b")], labels=["c", "d"]),
    "a template without a place for the input": lambda w: lw.Task([("a", "b")], template="{instruction}"),
    "training on a text": lambda w: lw.train_adapters(w.model, w.tokenizer, {"t": "walk"}, progress=False),
    "training on a list of tasks": lambda w: lw.train_adapters(w.model, w.tokenizer, [w.task], progress=False),
    "fitting on numbers": lambda w: lw.router("phatgoose", w.pool).fit(w.engine, [1, 2], steps=1),
    "an example of the search that is a text": lambda w: lw.Retriever(w.hub).for_examples("ab"),
    "messages to generate from": lambda w: w.engine.generate([CHAT]),
    "one message to generate from": lambda w: w.engine.generate(CHAT),
    "numbers to generate from": lambda w: w.engine.generate([5]),
    "nothing to generate from": lambda w: w.engine.generate(None),
    "one text to generate from": lambda w: w.engine.generate("a"),
    "messages to stream from": lambda w: list(w.engine.stream([CHAT])),
    "words to evaluate on": lambda w: w.composed.evaluate(["walk"]),
    "words of two letters to evaluate on": lambda w: w.composed.evaluate(["ab", "cd"]),
    "a misspelt column to evaluate on": lambda w: w.composed.evaluate([{"inpt": "a", "target": "b"}]),
    "a number to evaluate on": lambda w: w.composed.evaluate(5),
    "a text to predict": lambda w: w.composed.predict("walk"),
    "numbers to predict": lambda w: w.composed.predict([5]),
    "messages to fit on without an answer": lambda w: lw.router("phatgoose", w.pool).fit(w.engine, [CHAT], steps=1),
}

WEIGHTS = {
    "an unknown expert": lambda w: w.engine.activate({"d": 1.0}),
    "a weight that is a text": lambda w: w.engine.activate({"a": "much"}),
    "a weight that is no number": lambda w: w.engine.activate({"a": NAN}),
    "weights that are a number": lambda w: w.engine.activate(0.5),
    "a router that is a class of something else": lambda w: w.engine.activate(object()),
    "merging with too few weights": lambda w: lw.merge(w.adapters, [1.0]),
    "merging with no number": lambda w: lw.merge(w.adapters, [1.0, 1.0, NAN]),
    "merging with a text as a weight": lambda w: lw.merge(w.adapters, ["a", 1.0, 1.0]),
    "merging with one number": lambda w: lw.merge(w.adapters, 0.5),
    "merging a text": lambda w: lw.merge("ab", [1.0, 1.0]),
    "merging nothing": lambda w: lw.merge([], []),
    "merging to no rank": lambda w: lw.merge(w.adapters, [1.0] * 3, rank="a"),
    "merging to half a rank": lambda w: lw.merge(w.adapters, [1.0] * 3, rank=2.5),
    "merging with a seed that is a text": lambda w: lw.merge(w.adapters, [1.0] * 3, seed="x"),
    "merging what is no number": lambda w: lw.merge([broken(NAN)], [1.0], method="ties"),
    "merging with weights that overflow": lambda w: lw.merge(w.adapters, [1e38] * 3, method="sce"),
    "merging with more of them": lambda w: lw.merge(w.adapters, [1e38] * 3, method="breadcrumbs"),
    "merging licenses that exclude each other": lambda w: lw.merge(licensed(w, "GPL-3.0", "CC-BY-NC-4.0"), [1.0, 1.0]),
    "storing factors that are infinite": lambda w: w.hub.add(broken(math.inf)),
    "fusing weights that overflow": lambda w: w.engine.fused({"a": 1e38, "b": -1e38}).__enter__(),
    "an ensemble of no composer": lambda w: lw.ensemble(None, [{"a": 1.0}], {"input_ids": torch.ones(1, 2).long()}),
    "manual weights as a list": lambda w: compose(w, method="manual", weights=[1.0, 2.0]),
}

NAMES = {
    "a method to compose": lambda w: compose(w, method="lorahbu"),
    "an objective": lambda w: compose(w, objective="entropi"),
    "a space": lambda w: compose(w, space="delta"),
    "a start": lambda w: compose(w, start="best"),
    "a method to merge": lambda w: lw.merge(w.adapters, [1.0] * 3, method="tie"),
    "a method to fuse": lambda w: w.engine.fused({"a": 1.0}, method="tie").__enter__(),
    "a router": lambda w: lw.router("arow", w.pool),
    "no router": lambda w: lw.router(None, w.pool),
    "a recipe": lambda w: lw.experts("mola2", w.model),
    "no recipe": lambda w: lw.experts(None, w.model),
    "a registry": lambda w: lw.names("router"),
    "no registry": lambda w: lw.names(None),
    "an embedder": lambda w: lw.Retriever(w.hub, embedder="sentense"),
    "an embedder that is a number": lambda w: lw.Retriever(w.hub, embedder=3),
    "an index that is a number": lambda w: lw.Retriever(w.hub, index=3),
    "a key that is no key": lambda w: lw.Retriever(w.hub, keys="menn"),
    "an index": lambda w: lw.Retriever(w.hub, index="flatt"),
    "an adapter of a hub": lambda w: w.hub["d"],
    "a number as an adapter of a hub": lambda w: w.hub[5],
    "an export's target": lambda w: w.adapters[0].export(w.folder / "out", target="vlmm"),
    "a target module": lambda w: lw.train_adapters(
        w.model, w.tokenizer, {"t": w.task}, target_modules=["qq_proj"], progress=False
    ),
}

PATHS = {
    "an adapter from nothing": lambda w: lw.Adapter.from_pretrained(None),
    "an adapter from a number": lambda w: lw.Adapter.from_pretrained(5),
    "an adapter from nowhere": lambda w: lw.Adapter.from_pretrained(w.folder / "nowhere"),
    "a composition from nothing": lambda w: lw.Composition.from_pretrained(None, w.model, w.tokenizer),
    "a composition from nowhere": lambda w: lw.Composition.from_pretrained(w.folder / "nowhere", w.model, w.tokenizer),
    "a composition to nowhere": lambda w: w.composed.save_pretrained(None),
    "a composition over something else": lambda w: w.composed.save_pretrained(w.folder / "hub"),
    "an adapter to nowhere": lambda w: w.adapters[0].save_pretrained(None),
    "an adapter over something else": lambda w: w.adapters[0].save_pretrained(w.folder / "hub"),
    "an export to nowhere": lambda w: w.adapters[0].export(None),
    "a hub at nothing": lambda w: lw.Hub(None),
    "a hub of another scheme": lambda w: lw.Hub("mysql://somewhere"),
    "adding nothing to a hub": lambda w: w.hub.add(None),
    "adding nowhere to a hub": lambda w: w.hub.add(w.folder / "nowhere"),
    "composing from a hub's path": lambda w: compose(w, experts=str(w.folder / "hub")),
    "a retriever of a hub's path": lambda w: lw.Retriever(str(w.folder / "hub")),
    "a checkpoint that is a number": lambda w: compose(w, checkpoint=5),
}

OBJECTS = {
    "a composer of a pipeline": lambda w: lw.Composer(w.pipeline, w.pool),
    "a composer of nothing": lambda w: lw.Composer(None, w.pool),
    "a composer of a name": lambda w: lw.Composer("gpt2", w.pool),
    "a composer of no pool": lambda w: lw.Composer(w.model, None),
    "a pool of nothing": lambda w: lw.ExpertPool([]),
    "a pool of texts": lambda w: lw.ExpertPool(["a"]),
    "composing on a pipeline": lambda w: lw.compose(w.pipeline, w.tokenizer, w.pool, w.task),
    "composing without a tokenizer": lambda w: lw.compose(w.model, None, w.pool, w.task),
    "composing for a list": lambda w: compose(w, task=[("a", "b")]),
    "composing for a text": lambda w: compose(w, task="sort"),
    "experts on a pipeline": lambda w: lw.experts("mola", w.pipeline),
    "training a pipeline": lambda w: lw.train_adapters(w.pipeline, w.tokenizer, {"t": w.task}, progress=False),
    "fitting a router that learns nothing": lambda w: lw.router("arrow", w.pool).fit(w.engine, [("a", "b")]),
    "fitting the name of a router": lambda w: w.engine.fit("phatgoose", [("a", "b")]),
    "fitting without a composer": lambda w: lw.router("phatgoose", w.pool).fit(None, [("a", "b")]),
}

OPTIONS = {
    "a budget below zero": lambda w: compose(w, budget=-1),
    "a budget of a half": lambda w: compose(w, budget=2.5),
    "no budget and no seconds": lambda w: compose(w, budget=None),
    "seconds below zero": lambda w: compose(w, seconds=-1),
    "a fold": lambda w: compose(w, folds=1),
    "a seed that is a text": lambda w: compose(w, seed="x"),
    "a penalty below zero": lambda w: compose(w, l1=-1.0),
    "an option of another method": lambda w: compose(w, sigmma=1.0),
    "an option of another kind": lambda w: compose(w, sigma=None),
    "groups that are a text": lambda w: compose(w, groups="q"),
    "labels of a task without": lambda w: compose(w, objective="labels"),
    "gradients of exact matches": lambda w: compose(w, method="gradient", objective="exact_match"),
    "inputs of a loss with targets": lambda w: compose(w, inputs=["a"]),
    "inputs that are one text": lambda w: compose(w, method="gradient", objective="entropy", inputs="abc"),
    "retrieval scores of a pool": lambda w: compose(w, method="similarity"),
    "no density of a method": lambda w: lw.merge(w.adapters, [1.0] * 3, method="ties", density=None),
    "experts for blocks that there are not": lambda w: lw.experts("mola", w.model, num_experts=(2, 2, 2, 2, 2)),
    "tuning for no steps": lambda w: w.composed.tune(0),
    "pruning below zero": lambda w: w.composed.prune(-1.0),
    "cutting to no rank": lambda w: w.composed.cut(0),
    "a rank of none": lambda w: lw.train_adapters(w.model, w.tokenizer, {"t": w.task}, rank=0, progress=False),
    "steps below zero": lambda w: lw.train_adapters(w.model, w.tokenizer, {"t": w.task}, steps=-1, progress=False),
    "an option of no router": lambda w: lw.router("arrow", w.pool, top_q=1),
    "as many experts as there are not": lambda w: lw.router("arrow", w.pool, top_k=9),
    "a search for a number": lambda w: lw.Retriever(w.hub).candidates(5),
    "a dtype by a wrong name": lambda w: lw.load_base(dtype="float3"),
    "an instruction that is a number": lambda w: lw.Task([("a", "b")], instruction=3),
    "a template that is a number": lambda w: lw.Task([("a", "b")], template=3),
    "a study that is a number": lambda w: study(3),
    "the difference to no model": lambda w: lw.extract(None, w.model),
    "a plain LoRA on no model": lambda w: lw.to_lora(w.adapters[0], None),
    "the key of no model": lambda w: lw.base_key(None),
    "the sum of a name": lambda w: lw.merge("a", [1.0]),
}

CALLS = {
    f"{group}: {name}": call
    for group, calls in {
        "rows": ROWS,
        "weights": WEIGHTS,
        "names": NAMES,
        "paths": PATHS,
        "objects": OBJECTS,
        "options": OPTIONS,
    }.items()
    for name, call in calls.items()
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_wrong_call_is_refused_by_name(call, world):
    with pytest.raises(lw.LoraweaveError) as caught:
        call(world)
    # a sentence, and not the name of something alone
    assert len(str(caught.value).split()) > 3
    assert not world.engine.active


BASES = {
    "compose": lambda w, base: lw.compose(base, w.tokenizer, w.hub, w.task, progress=False),
    "compose the base": lambda w, base: lw.compose(base, w.tokenizer, w.hub, w.task, method="base", progress=False),
    "Composer": lambda w, base: lw.Composer(base, w.pool),
    "Composition.from_pretrained": lambda w, base: lw.Composition.from_pretrained(
        w.composed.save_pretrained(w.folder / "composed"), base, w.tokenizer
    ),
    "train_adapters": lambda w, base: lw.train_adapters(base, w.tokenizer, {"t": w.task}, steps=1, progress=False),
    "experts": lambda w, base: lw.experts("mola", base),
    "order": lambda w, base: lw.order(base, w.tokenizer, w.hub, w.task, progress=False),
    "hub.bind": lambda w, base: w.hub.bind("a", base),
    "to_lora": lambda w, base: lw.to_lora(w.adapters[0], base),
    "base_key": lambda w, base: lw.base_key(base),
}


OF_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@OF_PEFT
@pytest.mark.parametrize("call", BASES.values(), ids=BASES)
def test_pefts_adapters_in_a_base_are_refused_with_the_way_out(call, world, make_model):
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(lw.CompositionError, match=r"PeftModel\w* of peft, .* pass model\.unload\(\)"):
        call(world, model)
    with pytest.raises(lw.CompositionError, match=r"'model\.layers\.0\.self_attn\.q_proj' is peft's Linear.* unload\(\)"):
        call(world, model.get_base_model())


@OF_PEFT
def test_the_way_out_of_a_peft_model_is_a_base(world, make_model):
    base = make_model("llama")
    expected = lw.base_key(base)
    assert lw.base_key(get_peft_model(base, LoraConfig(target_modules=["q_proj"])).unload()) == expected
    prompted = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(lw.CompositionError, match=r"pass model\.get_base_model\(\)"):
        lw.base_key(prompted)
    assert lw.base_key(prompted.get_base_model()) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "nowhere", "--out", "m"],
        ["merge", "pool/a", "pool/b", "--method", "tie", "--out", "m"],
        ["merge", "pool/a", "--option", "densty=1", "--method", "ties", "--out", "m"],
        ["merge", "pool/a", "--out", "pool/b"],
        ["compose", "--pool", "pool", "--examples", "rows.jsonl", "--method", "lorahbu"],
        ["compose", "--pool", "pool", "--examples", "rows.jsonl", "--option", "objective=entropi"],
        ["compose", "--pool", "pool", "--examples", "rows.jsonl", "--option", "sigma=-1"],
        ["compose", "--pool", "pool", "--examples", "broken.jsonl"],
        ["compose", "--hub", "missing", "--examples", "rows.jsonl"],
        ["eval", "empty", "rows.jsonl"],
        ["export", "empty", "--out", "e"],
        ["export", "pool/a", "--out", "e", "--target", "vlmm"],
        ["train", "broken.jsonl", "--out", "t"],
        ["hub", "show", "a", "--hub", "missing"],
        ["hub", "add", "nowhere", "--hub", "new"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_one_line_with_the_errors_name(words, world, here):
    for adapter in world.adapters:
        adapter.save_pretrained(here / "pool" / adapter.name)
    (here / "empty").mkdir()
    (here / "rows.jsonl").write_text('{"input": "a", "target": "b"}\n{"input": "b", "target": "c"}\n')
    (here / "broken.jsonl").write_text('{"input": "a"}\n')
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert isinstance(getattr(lw.errors, line.split(":")[0], None), type)
