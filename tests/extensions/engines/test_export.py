"""What is given away as a PEFT folder: peft computes the same with it, and what is cut or refused is told."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from exported_llamas import adapter, best_error, by_peft, dense, with_layer

from loraweave.errors import AdapterExists, AdapterUnsupported, LoraweaveError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats.peft import Peft

# peft 0.21 asks transformers for an attribute that has been renamed there
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MIXED = {"q_proj": 3, "v_proj": 5, "down_proj": 2, "o_proj": 1}


def test_exported_folder_computes_what_the_adapter_says(tmp_path):
    given = adapter(MIXED)
    report = given.export(tmp_path / "out")
    want = dense({layer: given.delta(layer) for layer in given.layers})
    torch.testing.assert_close(by_peft(report.folder), want, rtol=1e-6, atol=1e-6)
    assert set(report.errors.values()) == {0.0}
    assert report.relative_error == 0.0
    assert report.rank == 5


def test_cut_of_the_rank_is_the_best_one_and_its_error_is_shown(tmp_path):
    given = adapter({"q_proj": 12, "v_proj": 3})
    report = given.export(tmp_path / "out", max_rank=8)
    again = Adapter.from_pretrained(report.folder)
    assert report.rank == again.rank == 8
    lost, total = [], []
    for layer in given.layers:
        error, norm = best_error(given.delta(layer), 8)
        assert report.errors[layer] == pytest.approx(error / norm, abs=1e-6)
        difference = (again.delta(layer) - given.delta(layer)).double().norm()
        assert float(difference) == pytest.approx(error, abs=1e-5)
        lost.append(error)
        total.append(norm)
    assert report.relative_error == pytest.approx(math.hypot(*lost) / math.hypot(*total), rel=1e-5)
    assert "rank cut in 2 layers" in str(report)
    assert f"{report.relative_error:.3g}" in str(report)


def test_report_as_json_is_json(tmp_path):
    report = adapter({"q_proj": 2}).export(tmp_path / "out")
    told = json.loads(json.dumps(report.to_json()))
    assert told["flags"] == list(report.flags)
    assert told["folder"] == str(tmp_path / "out")
    assert set(told["errors"].values()) == {0.0}


def test_plain_export_needs_no_flags_and_says_that_nothing_was_cut(tmp_path):
    report = adapter({"q_proj": 2}).export(tmp_path / "out")
    assert (report.target, report.flags, report.command) == ("peft", (), "")
    assert "no rank was cut" in str(report)


def test_dora_goes_to_peft_whole_and_is_never_cut(tmp_path):
    given = with_layer(adapter({"q_proj": 4}), magnitude_O=torch.ones(24))
    given = replace(given, layers=dict([next(iter(given.layers.items()))]))
    assert given.export(tmp_path / "whole", max_rank=4).rank == 4
    with pytest.raises(AdapterUnsupported, match=r"DoRA of rank 4.*cut to 2.*to_lora"):
        given.export(tmp_path / "cut", max_rank=2)


def test_heads_go_to_peft_with_a_warning_where_bases_tie_them(tmp_path):
    head = {"lm_head.weight": torch.randn(29, 24)}
    report = adapter({"q_proj": 2}, heads=head).export(tmp_path / "out")
    assert torch.equal(Peft.read(report.folder).heads["lm_head.weight"], head["lm_head.weight"])
    assert "'lm_head.weight' is a copy of its own" in report.warnings[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "pef"}, UnknownName, "did you mean 'peft'"),
        ({"target": "tgi"}, UnknownName, "no export target 'tgi'"),
        ({"max_rank": 0}, WeightingError, "max_rank=0 is below 1"),
        ({"max_rank": -3}, WeightingError, "max_rank=-3"),
    ],
)
def test_wrong_argument_is_refused_before_anything_is_written(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        adapter({"q_proj": 2}).export(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterExists, match=re.escape("thesis.txt")):
        adapter({"q_proj": 2}).export(tmp_path)
    assert issubclass(AdapterExists, LoraweaveError)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_exported_adapter_keeps_its_card_and_tells_how_it_was_made(tmp_path):
    given = adapter({"q_proj": 12}, card={"description": "d", "license": "mit"})
    given.export(tmp_path / "out", max_rank=8)
    card = Adapter.from_pretrained(tmp_path / "out").card
    assert (card["description"], card["license"], card["name"]) == ("d", "mit", "some adapter")
    assert card["export"]["rank"] == 8
    assert card["export"]["relative_error"] > 0
