"""A composition is given away as one adapter; trained heads are refused wherever updates are mixed."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import loraweave.cli
from loraweave.cli import compositions
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.report import Report
from loraweave.composer.composer import Composer
from loraweave.errors import AdapterUnsupported, CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Task

HEAD = {"lm_head.weight": torch.ones(2, 2)}


@pytest.fixture
def composed(tiny_llama, make_adapter, tokenizer):
    tiny_llama.name_or_path = "org/base"
    pool = ExpertPool(
        [replace(make_adapter(tiny_llama, name, seed=seed), base_model="org/base") for seed, name in enumerate("ab")]
    )
    report = Report((), "manual", "", (), 0.0, 0)
    return Composition(tiny_llama, tokenizer, Task([("x", "y")]), pool, {"a": 0.5, "b": -1.0}, "linear", report)


@pytest.mark.parametrize("target", ["peft", "vllm"])
def test_exported_composition_is_the_weighted_sum(composed, tmp_path, target):
    report = composed.export(tmp_path / "out", target=target)
    first, second = composed.pool["a"], composed.pool["b"]
    again = Adapter.from_pretrained(report.folder)
    assert set(again.layers) == set(first.layers)
    for layer in first.layers:
        want = 0.5 * first.delta(layer) - second.delta(layer)
        torch.testing.assert_close(again.delta(layer), want, rtol=1e-5, atol=1e-6)
    assert report.rank == first.rank + second.rank
    assert report.relative_error == 0.0


def test_exported_composition_can_be_cut(composed, tmp_path):
    report = composed.export(tmp_path / "out", target="vllm", max_rank=1)
    assert report.rank == 1
    assert 0 < report.relative_error < 1


def test_composition_that_is_the_base_has_nothing_to_export(composed, tmp_path):
    with pytest.raises(CompositionError, match="the base model itself"):
        replace(composed, all_weights={}).export(tmp_path / "out")


def test_command_exports_a_stored_composition(composed, tmp_path, monkeypatch):
    composed.save_pretrained(tmp_path / "c")
    monkeypatch.setattr(compositions, "load_model", lambda base: (composed.model, composed.tokenizer))
    words = ["export", str(tmp_path / "c"), "--target", "vllm", "--out", str(tmp_path / "p")]
    done = CliRunner().invoke(loraweave.cli.app, words)
    assert done.exit_code == 0, done.stderr
    assert f"composition={tmp_path / 'p'}" in done.stdout
    assert Adapter.from_pretrained(tmp_path / "p").rank == composed.adapter.rank


def test_head_is_never_left_out_of_a_mixture_without_a_word(composed):
    headed = replace(composed.pool["a"], heads=HEAD)
    for use in (
        lambda: Composer(composed.model, [headed]),
        lambda: Composer(composed.model, [composed.pool["b"], headed]),
        lambda: Composer(composed.model, [composed.pool["b"]]).swap(ExpertPool([headed])),
        lambda: ExpertPool([headed]).stacked(next(iter(headed.layers))),
        lambda: replace(composed, stored=headed).predict(["x"]),
    ):
        with pytest.raises(AdapterUnsupported, match=r"expert 'a' has a trained head \(lm_head.weight\).*heads=\{\}"):
            use()
    Composer(composed.model, [replace(headed, heads={})]).close()
