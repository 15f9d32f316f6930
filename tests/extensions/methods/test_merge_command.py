"""`loraweave merge` of a file of mergekit's."""

import json

import torch
from command_line import call
from safetensors.torch import load_file


def test_a_recipe_of_mergekits_takes_folders_beside_it_and_writes_its_dtype(two, here):
    models = "".join(f"  - {{model: pool/{name}, parameters: {{weight: 1.0}}}}\n" for name in ("left", "right"))
    (here / "recipe.yaml").write_text(f"merge_method: ties\nbase_model: tiny\ndtype: bfloat16\nmodels:\n{models}")
    told = json.loads(call("merge", "recipe.yaml", "--out", "out", "--json").stdout)
    assert (told["method"], told["dtype"], told["recipe"]) == ("mergekit", "bfloat16", "recipe.yaml")
    written = load_file("out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_a_file_that_means_something_else_for_adapters_leaves_nothing(here):
    (here / "recipe.yaml").write_text("merge_method: slerp\nmodels: []\n")
    done = call("merge", "recipe.yaml", "--out", "out")
    assert done.exit_code == 1
    assert "WeightingError: recipe.yaml: 'slerp' works on whole weights" in " ".join(done.stderr.split())
    assert not (here / "out").exists()


def test_a_file_that_nobody_reads_is_refused_with_what_is_read(here):
    (here / "recipe.yaml").write_text("models: []\n")
    done = call("merge", "recipe.yaml", "--out", "out")
    assert "recipe.yaml has models; a recipe has a 'formula', or mergekit's 'merge_method' and 'models'" in " ".join(
        done.stderr.split()
    )
