"""Formulas on the command line: merged, and kept in a hub."""

import json
from pathlib import Path

import pytest
import torch
from command_line import LAYERS, adapter, call, process

import loraweave as lw


@pytest.fixture
def hub(here):
    with lw.Hub("adapters") as opened:
        for seed, name in enumerate(("left", "right", "up - down")):
            opened.add(adapter(name, seed), license="MIT")
        yield opened


def test_merge_takes_a_formula_over_the_hub(hub):
    done = call("merge", "0.7*right -0.40 * left", "--out", "m", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["formula"], told["method"], told["license"]) == ("0.7*right - 0.4*left", "linear", "MIT")
    want = -0.4 * adapter("left", 0).delta(LAYERS[1]) + 0.7 * adapter("right", 1).delta(LAYERS[1])
    merged = lw.Adapter.from_pretrained("m")
    torch.testing.assert_close(merged.delta(LAYERS[1]), want)
    assert merged.name == "m"


def test_a_name_of_the_hub_is_that_adapter_even_if_it_looks_like_a_formula(hub):
    assert call("merge", "up - down", "--out", "m").exit_code == 0
    assert lw.Adapter.from_pretrained("m").hash == adapter("x", 2).hash
    assert "no adapter 'up'" in call("merge", "up  - down", "--out", "n").stderr


def test_a_formula_merges_by_its_method_with_the_flags_of_merge(hub):
    done = call("merge", "ties(left, right; density=0.5)", "--rank", "2", "--name", "voted", "--out", "m", "--json")
    assert json.loads(done.stdout)["method"] == "ties"
    want = lw.merge([hub["left"], hub["right"]], method="ties", density=0.5, rank=2)
    assert lw.Adapter.from_pretrained("m").hash == want.hash


@pytest.mark.parametrize("flags", [["--weights", "1"], ["--method", "ties"], ["--option", "density=1"], ["--seed", "3"]])
def test_flags_that_a_formula_has_in_it_are_wrong_usage(hub, flags):
    done = call("merge", "left + right", "--out", "m", *flags)
    assert done.exit_code == 2
    assert not Path("m").exists()


def test_an_error_in_a_formula_stands_above_the_formula_and_a_caret(hub, here):
    done = process("merge", "left + 0.5*rigth", "--out", "m", cwd=here)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-3:] == [
        "FormulaError: no adapter 'rigth' in the hub adapters; did you mean 'right'?",
        "  left + 0.5*rigth",
        "             ^~~~~",
    ]


def test_control_characters_of_a_formula_do_not_reach_the_terminal(hub):
    done = call("merge", "left + \x1b[31m\n$", "--out", "m")
    assert done.exit_code == 1
    assert "\x1b" not in done.stderr
    assert done.stderr.splitlines()[1].startswith("  left + ")


def test_a_formula_is_kept_and_merged_by_its_name(hub):
    done = call("hub", "save-composition", "both", "right+left")
    assert done.exit_code == 0, done.stderr
    (told,) = hub.compositions()
    assert (told.name, told.formula) == ("both", "left + right")
    assert call("merge", "2*@both", "--out", "m").exit_code == 0
    assert lw.Adapter.from_pretrained("m").hash == lw.merge([hub["left"], hub["right"]], [2, 2]).hash
    done = call("hub", "save-composition", "both", "right")
    assert (done.exit_code, "pass replace=True" in done.stderr) == (1, True)
    assert call("hub", "save-composition", "both", "right", "--replace").exit_code == 0


def test_a_formula_whose_adapters_are_not_there_is_not_kept(hub):
    done = call("hub", "save-composition", "both", "left + rigth")
    assert (done.exit_code, "did you mean 'right'" in done.stderr) == (1, True)
    assert hub.compositions() == []


def test_a_composed_folder_is_kept_with_its_report_and_written_again(hub, base, two, rows):
    composed = ["compose", "--pool", two, "--examples", rows, "--base", base, "--method", "uniform", "--out", "composed"]
    assert call(*composed).exit_code == 0
    done = call("hub", "save-composition", "swap", "composed", "--json")
    assert done.exit_code == 0, done.stderr
    (told,) = hub.compositions()
    assert told.report == json.loads(Path("composed/composition.json").read_text())["report"]
    hub.composition("swap").write("again")
    names = [str(path.relative_to("composed")) for path in Path("composed").rglob("*") if path.is_file()]
    assert [Path("again", name).read_bytes() for name in names] == [Path("composed", name).read_bytes() for name in names]
    scored = [
        json.loads(call("eval", folder, rows, "--base", base, "--split", "train", "--json").stdout)
        for folder in ("composed", "again")
    ]
    assert scored[0] == scored[1]


def test_a_damaged_folder_is_not_kept(hub):
    Path("broken").mkdir()
    Path("broken/composition.json").write_text("{}")
    done = call("hub", "save-composition", "swap", "broken")
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "AdapterCorrupt")
    assert hub.compositions() == []
