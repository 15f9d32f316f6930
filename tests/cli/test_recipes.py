"""`loraweave merge` of a recipe."""

import json

import pytest
import torch
from command_line import call
from safetensors.torch import load_file

import loraweave as lw


def test_a_recipe_with_a_formula_is_that_formula_over_its_pool(two, here):
    (here / "recipe.yaml").write_text("formula: 0.5*left + right\npool: pool\nrank: 1\n")
    assert call("merge", "recipe.yaml", "--out", "out").exit_code == 0
    pool = [lw.Adapter.from_pretrained(two / name) for name in ("left", "right")]
    expected = lw.merge(pool, [0.5, 1.0], rank=1)
    assert lw.Adapter.from_pretrained("out").layers.keys() == expected.layers.keys()
    assert lw.Adapter.from_pretrained("out").rank == 1


def test_a_recipe_of_mergekits_takes_folders_beside_it_and_writes_its_dtype(two, here):
    models = "".join(f"  - {{model: pool/{name}, parameters: {{weight: 1.0}}}}\n" for name in ("left", "right"))
    (here / "recipe.yaml").write_text(f"merge_method: ties\nbase_model: tiny\ndtype: bfloat16\nmodels:\n{models}")
    told = json.loads(call("merge", "recipe.yaml", "--out", "out", "--json").stdout)
    assert (told["method"], told["dtype"], told["recipe"]) == ("mergekit", "bfloat16", "recipe.yaml")
    written = load_file("out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--weights", "0.5"], 2, "leave --weights, --method"),
        (["--method", "ties"], 2, "leave --weights, --method"),
        ([], 1, "WeightingError: recipe.yaml: 'slerp' works on whole weights"),
    ],
)
def test_a_recipe_that_cannot_be_followed_leaves_nothing(here, words, status, said):
    (here / "recipe.yaml").write_text("merge_method: slerp\nmodels: []\n")
    done = call("merge", "recipe.yaml", "--out", "out", *words)
    assert (done.exit_code, said in " ".join(done.stderr.split())) == (status, True)
    assert not (here / "out").exists()
