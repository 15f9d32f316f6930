"""`loraweave merge` of a recipe."""

import pytest
from command_line import call

import loraweave as lw
from loraweave.cli._inputs import read_merge_file


def test_a_recipe_with_a_formula_is_that_formula_over_its_pool(two, here):
    (here / "recipe.yaml").write_text("formula: 0.5*left + right\npool: pool\nrank: 1\n")
    assert call("merge", "recipe.yaml", "--out", "out").exit_code == 0
    pool = [lw.Adapter.from_pretrained(two / name) for name in ("left", "right")]
    expected = lw.merge(pool, [0.5, 1.0], rank=1)
    assert lw.Adapter.from_pretrained("out").layers.keys() == expected.layers.keys()
    assert lw.Adapter.from_pretrained("out").rank == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x", "aliases are not read"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("- a", "'key: value'"),
        ("a: [", "not YAML"),
        ("models: []", "r.yaml has models; a recipe has a 'formula'"),
        ("formula: a\nformulas: b", "did you mean 'formula'"),
        ("formula: 1", "formula, hub, pool and heads are texts"),
        ("formula: a\nhub: b\npool: c", "has a hub and a pool"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(lw.WeightingError, match=message):
        read_merge_file(tmp_path / "r.yaml")


def test_a_file_of_anothers_is_read_by_the_extension_that_knows_it(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text("spell: abc")
    with pytest.raises(lw.WeightingError, match=r"r\.yaml has spell; a recipe has a 'formula'"):
        read_merge_file(tmp_path / "r.yaml")
    (tmp_path / "spells.py").write_text(
        "READS = \"a 'spell'\"\ndef read(path, said):\n    return (path.name, said) if said.get('spell') == 'abc' else None"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("loraweave.registry.brought", {"merge_files": {"mine": "spells"}}.get)
    assert read_merge_file(tmp_path / "r.yaml") == ("r.yaml", {"spell": "abc"})
    (tmp_path / "r.yaml").write_text("spell: xyz")
    with pytest.raises(lw.WeightingError, match="a recipe has a 'formula', or a 'spell'"):
        read_merge_file(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--weights", "0.5"], 2, "leave --weights, --method"),
        (["--method", "ties"], 2, "leave --weights, --method"),
        ([], 1, "WeightingError: recipe.yaml has spell; a recipe has a 'formula'"),
    ],
)
def test_a_recipe_that_cannot_be_followed_leaves_nothing(here, words, status, said):
    (here / "recipe.yaml").write_text("spell: abc\n")
    done = call("merge", "recipe.yaml", "--out", "out", *words)
    assert (done.exit_code, said in " ".join(done.stderr.split())) == (status, True)
    assert not (here / "out").exists()
