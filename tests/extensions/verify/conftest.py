"""A small model, adapters of it in folders, sound and damaged, and the hub that has them as they should be."""

from __future__ import annotations

import pytest

import loraweave as lw
from benchmarks._faults import FAULTS, write_faulty, write_sound
from loraweave.extensions.verify import verify_server

EXAMPLES = ["abc", "the judge thanked ", "zebra 12, 34. ", "up: ", "b", "country"]
# blocks whose numbers have another order as text, and heads as wide as engines take
SHAPE = {"num_hidden_layers": 11, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="session")
def small_shape():
    return SHAPE


@pytest.fixture(scope="session")
def small_model(make_model):
    return make_model("llama", **SHAPE)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, small_model, make_adapter):
    """Folders of passive, its older version and negation, of rank 8 on all of the attention."""
    root = tmp_path_factory.mktemp("folders")

    def write(name, seed, where):
        (root / where).mkdir()
        adapter = make_adapter(small_model, name, rank=8, targets=("q_proj", "k_proj", "v_proj", "o_proj"), seed=seed)
        layers = {layer: lw.Factors(0.1 * each.a_RI, each.b_OR) for layer, each in adapter.layers.items()}
        return write_sound(lw.Adapter(name, "tiny", layers), root / where / name)

    return {
        "passive": write("passive", 1, "sound"),
        "older": write("passive", 2, "old"),
        "negation": write("negation", 3, "other"),
    }


@pytest.fixture(scope="session")
def damaged(tmp_path_factory, folders):
    """({name of a fault: a folder that has it}, {name: what has to be said of it})."""
    root, said = tmp_path_factory.mktemp("damaged"), {}
    width, last = SHAPE["hidden_size"] // SHAPE["num_attention_heads"], SHAPE["num_hidden_layers"] - 1
    for name in FAULTS:
        beside = folders["negation"], folders["older"]
        said[name] = write_faulty(name, folders["passive"], *beside, root / name, head=width, last=last)
    return {name: root / name for name in FAULTS}, said


@pytest.fixture(scope="session")
def hub(tmp_path_factory, folders):
    """What is right: passive under its name and under that of every fault, as its second version, and negation."""
    with lw.Hub(tmp_path_factory.mktemp("hub")) as opened:
        for name in ("passive", *FAULTS):
            opened.add(folders["older"], name=name, examples=EXAMPLES)
            opened.add(folders["passive"], name=name, examples=EXAMPLES, replace=True)
        opened.add(folders["negation"], name="negation", examples=EXAMPLES)
        yield opened


@pytest.fixture(scope="session")
def look(small_model, tokenizer):
    def verify(url, hub, names=None, **options):
        return verify_server(
            url, hub, names, model=small_model, tokenizer=tokenizer, progress=False, keep=False, num_tokens=4, **options
        )

    return verify
