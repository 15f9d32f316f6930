"""What is written: the folder whole or not at all, names that match exactly, and a card for people."""

import json

import pytest
import torch
import yaml
from tiny_models import random_factors

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats.peft import Peft
from loraweave.types import Factors, Fingerprint


def factors(rank=2, inputs=5, outputs=3, seed=0, **more):
    return random_factors(seed, rank, outputs, inputs, **more)


def contents(card=None, fingerprint=None, **layers):
    named = {name.replace("__", "."): value for name, value in (layers or {"m__q": factors()}).items()}
    return Contents("a/base", named, fingerprint, card or {})


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def digest(some):
    return Adapter("x", "y", some.layers).hash


ROUND_TRIPS = {
    "ranks": {"m__q": factors(2), "m__k": factors(3), "m__v": factors(3)},
    "bias of one layer": {"m__q": factors(bias_O=torch.ones(3)), "m__k": factors()},
    "bias of zeros": {"m__q": factors(bias_O=torch.zeros(3))},
    "trained bias of rank zero": {"m__q": factors(), "m__k": factors(0, base_bias_O=torch.ones(3))},
    "trained bias without inputs": {"m__q": factors(), "m__k": factors(0, 0, base_bias_O=torch.ones(3))},
    "bias of rank zero": {"m__q": factors(), "m__k": factors(0, 7, bias_O=torch.ones(3))},
    "nothing at rank zero": {"m__q": factors(), "m__k": factors(0, 7)},
    "every part": {"m__q": factors(bias_O=torch.ones(3), base_bias_O=torch.ones(3))},
    "DoRA": {
        "m__q": factors(magnitude_O=torch.ones(3)),
        "m__k": factors(magnitude_O=torch.ones(3), base_bias_O=torch.ones(3)),
    },
    "DoRA of every kind": {
        "m__q": factors(magnitude_O=torch.ones(3)),
        "emb": factors(kind="embedding", magnitude_O=torch.ones(3)),
        "c2": factors(1, 12, kind="conv", kernel=(3, 2), magnitude_O=torch.ones(3)),
    },
    "kinds": {
        "emb": factors(kind="embedding"),
        "c1": factors(2, 12, kind="conv", kernel=(3,)),
        "c2": factors(1, 12, kind="conv", kernel=(3, 2)),
    },
    "one by one": {"q": factors(1, 1, 1)},
    "views of one storage": {"m__q": factors(), "m__k": factors()},
    "adapter words in names": {"default__lora__q": factors(), "model__base_model": factors(seed=1)},
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_reading_gives_back_what_was_written(case, tmp_path):
    given = contents(**ROUND_TRIPS[case])
    assert digest(Peft.read(Peft.write(given, tmp_path / "out"))) == digest(given)


REFUSED = {
    "gain": ({"m__q": factors(gain_O=torch.ones(3))}, "gain"),
    "DoRA next to plain": ({"m__q": factors(magnitude_O=torch.ones(3)), "m__k": factors()}, "use_dora|all or none"),
    "DoRA of rank zero": ({"m__q": factors(0, magnitude_O=torch.ones(3))}, "DoRA of rank 0"),
    "DoRA with a bias": ({"m__q": factors(magnitude_O=torch.ones(3), bias_O=torch.ones(3))}, "DoRA"),
    "bias of an embedding": ({"m__q": factors(kind="embedding", bias_O=torch.ones(3))}, "embedding"),
    "bias next to an embedding": ({"m__q": factors(bias_O=torch.ones(3)), "emb": factors(kind="embedding")}, "embedding"),
    "only trained biases": ({"m__q": factors(0, base_bias_O=torch.ones(3))}, "no low-rank update"),
    "not finite": ({"m__q": Factors(torch.ones(1, 2), torch.tensor([[float("inf")]]))}, "infinite"),
    "name that cannot be told apart": ({"m__base_layer__q": factors()}, "name"),
    "name with PEFT's prefix": ({"base_model__model__q": factors()}, "name"),
    "name with a newline": ({"m\nq": factors()}, "name"),
    "long name": ({"q" * 600: factors()}, "name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_update_without_a_form_in_peft_is_refused_and_nothing_appears(case, tmp_path):
    layers, message = REFUSED[case]
    with pytest.raises(AdapterUnsupported, match=message):
        Peft.write(contents(**layers), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_dtype_that_peft_does_not_train_in_is_refused(dtype, tmp_path):
    with pytest.raises(AdapterUnsupported, match="float16"):
        Peft.write(contents(), tmp_path / "out", dtype=dtype)


def test_value_beyond_half_precision_is_refused_when_that_is_asked_for(tmp_path):
    with pytest.raises(AdapterUnsupported, match="float16"):
        Peft.write(contents(q=Factors(torch.ones(1, 2), torch.full((2, 1), 1e6))), tmp_path / "out", dtype=torch.float16)


CONFIGS = {
    "the scale is one since it is in b": (
        {"m__q": factors(4), "m__k": factors(4), "m__v": factors(2)},
        {"r": 4, "lora_alpha": 4, "rank_pattern": {r"^m\.v": 2}, "alpha_pattern": {r"^m\.v": 2}},
    ),
    "full paths are listed": ({"m__q": factors(), "m__k": factors()}, {"target_modules": ["m.k", "m.q"]}),
    "a name that ends another one's is matched exactly": (
        {"m__q": factors(), "x__m__q": factors(0, base_bias_O=torch.ones(3))},
        {"target_modules": r"m\.q"},
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_config_says_what_the_tensors_are(case, tmp_path):
    layers, fields = CONFIGS[case]
    config = config_of(Peft.write(contents(**layers), tmp_path / "out"))
    assert {name: config[name] for name in fields} == fields


def test_card_and_fingerprint_come_back(tmp_path):
    card = {"name": "näme", "description": "Tells: 'yes' or #no", "examples": [["a", "b"]], "license": "mit"}
    card |= {"tags": ["x"], "scores": {"em": 0.5}}
    again = Peft.read(Peft.write(contents(card, Fingerprint("abc", (0.5, 1.0))), tmp_path / "out"))
    assert {key: again.card[key] for key in card} == card
    assert again.fingerprint == Fingerprint("abc", (0.5, 1.0))
    assert again.base_model == "a/base"


def test_readme_has_safe_front_matter_and_tells_the_card(tmp_path):
    card = {"name": "n", "description": "Sorts words.", "license": "mit: #1\n---\nx", "tags": ["a: b"]}
    card |= {"examples": [["in", "out"]], "scores": {"em": 0.5}, "recipe": "r=2"}
    folder = Peft.write(contents(card), tmp_path / "out")
    text = (folder / "README.md").read_text()
    matter = yaml.safe_load(text.split("---\n# ")[0].removeprefix("---\n").split("\n---\n\n#")[0])
    assert matter["base_model"] == "a/base"
    assert matter["library_name"] == "peft"
    assert matter["tags"] == ["lora", "loraweave", "a: b"]
    assert (matter["license"], matter["license_name"]) == ("other", "mit: #1\n---\nx")
    assert all(part in text for part in ("Sorts words.", "in", '"em": 0.5', "r=2"))


def test_readme_alone_gives_license_tags_description_and_base(tmp_path):
    out = Peft.write(contents(), tmp_path / "out")
    (out / "loraweave.json").unlink()
    (out / "adapter_config.json").write_text(json.dumps(config_of(out) | {"base_model_name_or_path": None}))
    (out / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\ndescription: d\nbase_model: x/y\n---\ntext")
    again = Peft.read(out)
    assert (again.card["license"], again.card["tags"], again.card["description"]) == ("mit", ["a", "b"], "d")
    assert again.base_model == "x/y"


BAD_READMES = [
    "---\nlicense: !!python/object/apply:os.system ['exit 1']\n---\n",
    "---\na: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n---\n",
    "---\n<<: [1]\nlicense: [mit]\n---\n",
    "---\n{}: [\n---\n",
    "---\n" + "[" * 20_000,
    "---\nx: 2024-99-99\n---\n",
    "no front matter",
    "---\n" + "x" * 10**6,
]


@pytest.mark.parametrize("text", BAD_READMES)
def test_damaged_readme_never_blocks(text, tmp_path):
    out = Peft.write(contents(), tmp_path / "out")
    (out / "loraweave.json").unlink()
    (out / "README.md").write_text(text)
    assert not {"license", "tags", "description"} & set(Peft.read(out).card)


@pytest.mark.parametrize("text", ["{", "[]", '{"fingerprint": 3}', '{"fingerprint": {}}', '{"name": 3}', '{"a": NaN}'])
def test_damaged_sidecar_is_refused_because_it_holds_the_fingerprint(text, tmp_path):
    out = Peft.write(contents(), tmp_path / "out")
    (out / "loraweave.json").write_text(text)
    with pytest.raises(AdapterCorrupt, match=r"loraweave\.json"):
        Peft.read(out)


def test_layout_notes_cannot_change_a_value(tmp_path):
    given = contents(m__q=factors(bias_O=torch.ones(3)))
    out = Peft.write(given, tmp_path / "out")
    (out / "loraweave.json").write_text(json.dumps({"layout": {"padded_bias": ["m.q"], "rank_zero": {"m.q": 10**30}}}))
    assert digest(Peft.read(out)) == digest(given)


def test_written_tensors_do_not_share_memory_with_the_factors(tmp_path):
    held = factors()
    before = held.b_OR.clone()
    again = Peft.read(Peft.write(contents(m__q=held), tmp_path / "out"))
    again.layers["m.q"].b_OR.zero_()
    assert torch.equal(held.b_OR, before)
